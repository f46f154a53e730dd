"""Finds the call of a function in an answer.

Takes the answer's text in pieces, returns OpenAI's deltas: content, or the one call that it is.
What a call looks like in the model's words is the family's knowledge.
"""

import uuid


class ToolCallParser:
    """Sorts the pieces of one answer; holds text back until it is decided whether it is a call.

    family.tool_call(text, names) finds a call, family.may_be_tool_call(text, names) says whether a beginning
    may still become one. names: of the functions offered; without any, all is content. forced: the
    function whose call the prompt already began.
    """

    def __init__(self, family=None, names=(), forced: str | None = None):
        self._family = family
        self._names = names
        self._forced = forced
        self._held_back = ""
        self._sort = self._undecided if names else self._content

    @property
    def found_call(self) -> bool:
        return self._sort == self._arguments

    def push(self, piece: str) -> list[dict]:
        return self._sort(piece) if piece else []

    def finish(self) -> list[dict]:
        """What was held back, when no more comes."""
        if self._sort != self._undecided:
            return []
        if self._forced:
            return self._begin_call(self._forced, "")
        return self._content(self._held_back)

    def message(self, text: str) -> dict:
        """OpenAI's message of a whole answer."""
        deltas = self.push(text) + self.finish()
        if not self.found_call:
            return {"role": "assistant", "content": text}
        [call] = deltas[0]["tool_calls"]
        del call["index"]
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    def _undecided(self, piece: str) -> list[dict]:
        self._held_back += piece
        if self._forced:
            return self._begin_call(self._forced, self._held_back)
        found = self._family.tool_call(self._held_back, self._names)
        if found:
            return self._begin_call(*found)
        if self._family.may_be_tool_call(self._held_back, self._names):
            return []
        self._sort = self._content
        return self._content(self._held_back)

    def _begin_call(self, name: str, arguments: str) -> list[dict]:
        self._sort = self._arguments
        call = {
            "index": 0,
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        return [{"tool_calls": [call]}]

    def _content(self, piece: str) -> list[dict]:
        return [{"content": piece}] if piece else []

    def _arguments(self, piece: str) -> list[dict]:
        return [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}]
