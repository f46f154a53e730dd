"""Functions that a model may call: OpenAI's description of them, of calls and of the choice, and calls in an answer.

How a call looks in the model's words is the family's knowledge (models.glm4.Glm4.called).
"""

import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

MAX_TOOLS, MAX_DEPTH = 128, 32
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def shallow(schema: dict) -> dict:
    """Refuses what nests so deep that printing it would exhaust the stack."""
    level = [schema]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        level = [
            v
            for x in level
            if isinstance(x, (dict, list))
            for v in (x.values() if isinstance(x, dict) else x)
        ]
    return schema


class Function(BaseModel):
    name: Name
    description: Annotated[str, Field(max_length=100_000)] | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(shallow)] | None = None
    strict: Literal[False] | None = (
        None  # the arguments are as the model writes them: nobody makes them fit
    )


class Tool(BaseModel):
    type: Literal["function"]
    function: Function

    def told(self) -> dict:
        """As the model is told of it: what the client gave, in OpenAI's order."""
        function = {
            name: getattr(self.function, name) for name in ("name", "description", "parameters")
        }
        return {
            "type": "function",
            "function": {key: value for key, value in function.items() if value is not None},
        }


class Called(BaseModel):
    name: Name
    arguments: Annotated[str, Field(max_length=10_000_000)]


class ToolCall(BaseModel):
    """A call that an earlier answer made, as the client gives it back."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: Called


class FunctionName(BaseModel):
    name: Name


class Choice(BaseModel):
    """The one function that the answer has to call."""

    type: Literal["function"]
    function: FunctionName


class Reader:
    """Sorts the pieces of one answer into OpenAI's deltas: content, or the one call that it is.

    family.called(text, names) tells a call, family.may_call(text, names) whether a beginning may still become one; until
    that is decided the text is held back. forced: the function whose call the prompt already began.
    """

    def __init__(self, family=None, names=(), forced: str | None = None):
        self._family = family
        self._names = names
        self._forced = forced
        self._held = ""
        self._sort = self._undecided if names else self._content

    @property
    def called(self) -> bool:
        return self._sort == self._arguments

    def push(self, piece: str) -> list[dict]:
        return self._sort(piece) if piece else []

    def finish(self) -> list[dict]:
        """What was held back, when no more comes."""
        if self._sort != self._undecided:
            return []
        return self._call(self._forced, "") if self._forced else self._content(self._held)

    def message(self, text: str) -> dict:
        """A whole answer."""
        deltas = self.push(text) + self.finish()
        if not self.called:
            return {"role": "assistant", "content": text}
        [call] = deltas[0]["tool_calls"]
        del call["index"]
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    def _undecided(self, piece):
        self._held += piece
        found = (
            (self._forced, self._held)
            if self._forced
            else self._family.called(self._held, self._names)
        )
        if found:
            return self._call(*found)
        if self._family.may_call(self._held, self._names):
            return []
        self._sort = self._content
        return self._content(self._held)

    def _call(self, name, arguments):
        self._sort = self._arguments
        function = {"name": name, "arguments": arguments}
        return [
            {
                "tool_calls": [
                    {
                        "index": 0,
                        "id": f"call_{uuid.uuid4().hex}",
                        "type": "function",
                        "function": function,
                    }
                ]
            }
        ]

    def _content(self, piece):
        return [{"content": piece}] if piece else []

    def _arguments(self, piece):
        return [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}]
