from dataclasses import dataclass, field


@dataclass
class Findings:
    problems: list = field(default_factory=list)
def validate(folder):
    return Findings()
