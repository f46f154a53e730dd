"""The page's history as chat messages.

Takes what Gradio's chat shows, returns messages as `Engine.prompt` takes them.
"""

from models.prompt.messages import content


def chat_messages(history: list[dict], question: str, images: list[str], system: str) -> list[dict]:
    """The turns that the page shows, then the new question about `images` (paths).

    Answers that were stopped at once are left out with their question, for no model was trained on
    two questions in a row.
    """
    messages = []
    if system.strip():
        messages.append({"role": "system", "content": system.strip()})
    for turn in history:
        text, files = split_turn(turn)
        if turn["role"] == "user":
            asked = {"role": "user", "content": content(text, files)}
        elif text:
            messages += [asked, {"role": "assistant", "content": text}]
    return [*messages, {"role": "user", "content": content(question, images)}]


def split_turn(turn: dict) -> tuple[str, list[str]]:
    """Text and paths of a turn of the page."""
    text = ""
    files = []
    for part in turn["content"]:
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] == "file":
            files.append(part["file"]["path"])
    return text, files
