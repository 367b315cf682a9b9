"""Whatever a client sends, the server answers as its OpenAPI document says, and never with a server error."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from nanoflow.config import ServerConfig
from nanoflow.server.app import create_app
from tests.fake_async_engine import FakeAsyncEngine

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", create_app(FakeAsyncEngine(), ServerConfig()))
# Their bodies take long to make up, or are made up for another operation too.
NUM_EXAMPLES = {"POST /v1/messages": 8, "POST /v1/messages/count_tokens": 2, "POST /v1/responses": 12}
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: str(mode.value))
@pytest.mark.parametrize("label", list(OPERATIONS))
def test_answers_keep_to_the_document(label: str, mode: Any) -> None:
    operation = OPERATIONS[label]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("nothing to get wrong")

    @settings(
        max_examples=NUM_EXAMPLES.get(label, 10 if "response_id" in label else 30),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=st.deferred(lambda: operation.as_strategy(generation_mode=mode)))
    def answers(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    answers()
