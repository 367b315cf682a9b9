"""vLLM's own quick start with the import changed: `LLM` and `SamplingParams` in process; asks no server."""

from __future__ import annotations

from nanoflow import LLM, SamplingParams


def main() -> None:
    """The example, as its documentation has it."""
    prompts = [
        "Hello, my name is",
        "The president of the United States is",
        "The capital of France is",
        "The future of AI is",
    ]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
    llm = LLM(model="default")
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
    assert [output.prompt for output in outputs] == prompts and all(output.outputs[0].text for output in outputs)


if __name__ == "__main__":
    main()
