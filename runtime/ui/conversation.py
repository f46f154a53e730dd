"""The page's history as chat messages."""

from models.prompt.messages import content


def conversation(
    history: list[dict], question: str, pictures: list[str], system: str
) -> list[dict]:
    """What the page shows, and the new question, as chat messages. Answers that were stopped at once are left out with
    their question, for no model was trained on two questions in a row."""
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in history:
        files = [part["file"]["path"] for part in turn["content"] if part["type"] == "file"]
        text = "".join(part["text"] for part in turn["content"] if part["type"] == "text")
        if turn["role"] == "user":
            asked = {"role": "user", "content": content(text, files)}
        elif text:
            messages += [asked, {"role": "assistant", "content": text}]
    return [*messages, {"role": "user", "content": content(question, pictures)}]
