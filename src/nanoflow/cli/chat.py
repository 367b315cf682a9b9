"""`nanoflow chat`: a conversation on the terminal, with an engine in this process or with a server.

A backend is a function from the messages to an iterator of pieces of text. Ctrl-C closes that iterator, which aborts
the answer. `session.py` runs the engine in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from nanoflow.cli.generate import NOT_FOR_TERMINALS, for_so_many
from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.errors import EngineError
from nanoflow.request import SamplingParams

if TYPE_CHECKING:
    import httpx

    from nanoflow.cli.session import Message

    Reply = Callable[[Sequence[Message]], Generator[str]]

_TEACH = """\
Talk to a model. The conversation is kept, the answer streams, Ctrl-C stops the
answer and nothing else. In the chat, /help lists the commands, /reset forgets
the conversation, /quit (or Ctrl-D) leaves. With --url the model is that of a
running OpenAI-compatible server; options of the engine do not matter then, and
only the sampling options that are given are sent."""

_EXAMPLES = """\
  nanoflow chat --model Qwen/Qwen3-0.6B --system "Answer in one sentence."
  nanoflow chat --url http://127.0.0.1:8000/v1
  echo "Name three rivers." | nanoflow chat --model Qwen/Qwen3-0.6B"""

_COMMANDS_HELP = """\
/help   this text
/reset  forget the conversation
/quit   leave (also: Ctrl-D)
Ctrl-C stops the answer."""

KEY_VARIABLE = "NANOFLOW_API_KEY"
_ENGINE = OptionGroup(kind=EngineConfig, title="model and engine", skip=frozenset({"seed"}))
_SAMPLING = OptionGroup(
    kind=SamplingParams, title="sampling", skip=NOT_FOR_TERMINALS | {"n"}, defaults={"max_tokens": None}
)


class Thought(str):
    """A piece of the model's reasoning: printed, and no part of the conversation."""


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow chat`."""
    parser = add_command(commands, "chat", "talk to a model, here or on a server", _TEACH, _EXAMPLES)
    parser.add_argument("--system", metavar="TEXT", help="System message that opens the conversation")
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        type=_json_object,
        help="""Further variables of the chat template, for example '{"enable_thinking": false}'""",
    )
    parser.add_argument("--url", metavar="URL", help="Talk to the server there, for example http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"Key that the server asks for (also: the environment variable {KEY_VARIABLE})"
    )
    _SAMPLING.add_to(parser)
    _ENGINE.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until /quit or the end of input."""
    with ExitStack() as stack:
        reply = _server_reply(args, stack) if args.url else _engine_reply(args, stack)
        return talk(reply, system=args.system)


def talk(reply: Reply, *, system: str | None) -> int:
    """Read lines of standard input and print the answers, until /quit or the end of input.

    Returns:
        Exit status: 1 if standard input is not a terminal and a line could not be answered, else 0.
    """
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    is_interactive, status = sys.stdin.isatty(), 0
    if is_interactive:
        import readline  # noqa: F401  (arrow keys and history in input())

        print(_COMMANDS_HELP)
    while (line := _read_line(is_interactive=is_interactive)) is not None:
        if line == "/quit":
            return status
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            print(_COMMANDS_HELP)
        elif line:
            answered = _take_turn(reply, messages, line)
            status = 1 if answered is None and not is_interactive else status
            messages = messages if answered is None else answered
    return status


def _read_line(*, is_interactive: bool) -> str | None:
    """The next line, stripped; None at the end of input. Ctrl-C at the prompt starts a new line."""
    while True:
        try:
            return input(">>> " if is_interactive else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            print("\n(/quit or Ctrl-D leaves)")


def _take_turn(reply: Reply, messages: list[Message], line: str) -> list[Message] | None:
    """Print the answer to a line and return the conversation with both; None if there was an error."""
    asked = [*messages, {"role": "user", "content": line}]
    answer = ""
    try:
        with closing(reply(asked)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
                if not isinstance(piece, Thought):
                    answer += piece
    except KeyboardInterrupt:
        pass  # The part that was printed stays in the conversation.
    except (ValueError, OSError, EngineError) as error:
        if answer:
            print()
        hint = " (/reset forgets the conversation)" if sys.stdin.isatty() else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return None
    print()
    return [*asked, {"role": "assistant", "content": answer}]


def _engine_reply(args: argparse.Namespace, stack: ExitStack) -> Reply:
    """A backend with an engine in this process."""
    from nanoflow.cli.session import EngineSession

    _SAMPLING.read(args)  # Refuses invalid parameters before the model is loaded.
    session = stack.enter_context(EngineSession(for_so_many(_ENGINE.read(args), 1)))
    problem = session.template_problem()
    if problem is not None:
        raise ConfigError(problem)
    params = _SAMPLING.read(args, session.recommended)
    options = {} if args.chat_template_kwargs is None else {"template_kwargs": args.chat_template_kwargs}
    return lambda messages: session.stream(session.chat_prompt(messages, **options), params)


def _server_reply(args: argparse.Namespace, stack: ExitStack) -> Reply:
    """A backend with a server."""
    import httpx

    _SAMPLING.read(args)  # Refuses invalid parameters before the first message.
    key = args.api_key or os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client = stack.enter_context(httpx.Client(base_url=_checked_url(args.url), headers=headers, timeout=None))
    served = _served_model(client)
    body = {"model": _ENGINE.given(args).get("model") or served, **_SAMPLING.given(args)}
    if args.chat_template_kwargs is not None:
        body["chat_template_kwargs"] = args.chat_template_kwargs
    return lambda messages: _stream_from_server(client, {**body, "messages": list(messages), "stream": True})


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("""a JSON object is expected, as '{"enable_thinking": false}'""")
    return value


def _checked_url(url: str) -> str:
    """The URL unchanged; ConfigError if it has no scheme."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url!r} is no URL; give it as http://HOST:PORT/v1")
    return url


def _served_model(client: httpx.Client) -> str:
    """The server's first model. If the URL lacks the API's prefix /v1, adds it to the client's base URL."""
    import httpx

    given = client.base_url
    try:
        response = client.get("models")
        if response.status_code == httpx.codes.NOT_FOUND and not given.path.rstrip("/").endswith("/v1"):
            client.base_url = given.join("v1/")
            response = client.get("models")
            if response.status_code == httpx.codes.NOT_FOUND:
                raise LookupError("neither there nor below /v1 is an OpenAI-compatible API")
        if response.is_error:
            raise LookupError(_refusal(response))
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, LookupError, ValueError, TypeError) as error:
        raise ConnectionError(f"no model to talk to at {given}: {error}") from error


def _refusal(response: httpx.Response) -> str:
    """A server's error message for a request that it refused, as one line."""
    try:
        said = str(response.json()["error"]["message"])
    except (LookupError, ValueError, TypeError):
        said = response.reason_phrase
    return f"HTTP {response.status_code}: {said}"


def _stream_from_server(client: httpx.Client, body: Mapping[str, Any]) -> Generator[str]:
    import httpx

    try:
        with client.stream("POST", "chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise ConnectionError(_refusal(response))
            is_whole = thinks = False
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    is_whole = True
                else:
                    piece = _text_of(json.loads(data))
                    if thinks and piece and not isinstance(piece, Thought):
                        yield Thought("\n\n")
                    thinks = isinstance(piece, Thought) or (thinks and not piece)
                    yield piece
            if not is_whole:
                raise ConnectionError("the server's answer broke off before its end")
    except httpx.HTTPError as error:
        raise ConnectionError(str(error)) from error


def _text_of(event: Mapping[str, Any]) -> str:
    if "error" in event:
        raise ConnectionError(str(event["error"]))
    deltas = [choice["delta"] for choice in event["choices"]]
    thought = "".join(delta.get("reasoning_content") or delta.get("reasoning") or "" for delta in deltas)
    return Thought(thought) if thought else "".join(delta.get("content") or "" for delta in deltas)
