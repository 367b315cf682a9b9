"""Events of a stream: the fast way to write one gives the same bytes as the slow way."""

from __future__ import annotations

import pytest

from nanoflow.server.streaming import EventTemplate, event


@pytest.mark.parametrize(
    "text", ["", "a", 'quo"te\\', "line\nbreak\r\x00\x1f\x7f", "naïve 東京 \U0001f600", "\u2028</script>"]
)
def test_a_template_gives_the_events_of_its_chunks(text: str) -> None:
    def chunk(text: str) -> dict[str, object]:
        return {"id": "a", "created": 5, "model": 'mo"del', "choices": [{"index": 0, "text": text, "logprobs": None}]}

    assert EventTemplate(chunk).fill(text) == event(chunk(text))
