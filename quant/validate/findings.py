"""What validation finds, and which engines it stops.

Takes findings one by one; returns which consumers load the folder, and what is wrong for all of
them.
"""

from dataclasses import dataclass, field

MINDIE = "MindIE-LLM"
A2 = "vllm-ascend on 910B"
P310 = "vllm-ascend on 310P"
CONSUMERS = (MINDIE, A2, P310)


@dataclass
class Finding:
    """text: one sentence. stops: the consumers that cannot load the folder because of it."""

    text: str
    stops: tuple[str, ...] = CONSUMERS


@dataclass
class Findings:
    found: list[Finding] = field(default_factory=list)

    def loads(self, consumer: str) -> bool:
        return not any(consumer in finding.stops for finding in self.found)

    @property
    def problems(self) -> list[str]:
        """What stops every consumer at once, or, if each is stopped by something else, all
        findings: a folder that no consumer loads is damaged too."""
        damage = [finding.text for finding in self.found if finding.stops == CONSUMERS]
        if damage or any(self.loads(consumer) for consumer in CONSUMERS):
            return damage
        return [finding.text for finding in self.found]
