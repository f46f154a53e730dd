"""Functions that a model may call, as a request describes them.

Takes OpenAI's JSON of tools, of earlier calls and of the choice, returns checked objects.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from runtime.serve.transport.bodies import Body

MAX_DEPTH = 32  # of the JSON schema of a function's parameters
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def check_depth(schema: dict) -> dict:
    """Refuses what nests so deep that printing it would exhaust the stack."""
    level = [schema]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
        deeper = []
        for value in level:
            if isinstance(value, dict):
                deeper += value.values()
            elif isinstance(value, list):
                deeper += value
        level = deeper
    return schema


def check_strict(strict: bool) -> bool:
    """The arguments are as the model writes them: nothing makes them fit the schema."""
    if strict:
        raise ValueError("is true, which this server cannot promise; leave it out")
    return strict


class Function(Body):
    name: ToolName
    description: Annotated[str, Field(max_length=100_000)] | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(check_depth)] | None = None
    strict: Annotated[bool, AfterValidator(check_strict)] | None = None


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: Function

    def as_prompt_json(self) -> dict:
        """What the model reads of it: what the client gave, in OpenAI's order."""
        given = {}
        for name in ("name", "description", "parameters"):
            value = getattr(self.function, name)
            if value is not None:
                given[name] = value
        return {"type": "function", "function": given}


class FunctionCall(Body):
    name: ToolName
    arguments: Annotated[str, Field(max_length=10_000_000)]


class ToolCall(Body):
    """A call that an earlier answer made, as the client sends it back."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionName(Body):
    name: ToolName


class ToolChoice(Body):
    """The one function that the answer has to call."""

    type: Literal["function"] = "function"
    function: FunctionName
