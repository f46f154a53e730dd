"""The process in which templates of checkpoints are rendered: a template is a program that may never end.

Reads a JSON request per line {"source", "variables"} (variables null: compile only), writes a JSON answer per line
{"text"} or {"error"}; that of compiling is "parts" or "string", the form of content that the template reads. The kernel ends the process when a request takes more than SECONDS of processor time; memory
beyond MEMORY and texts beyond LONGEST become errors.
"""

import json
import math
import resource
import sys
from functools import lru_cache

from jinja2 import TemplateSyntaxError

from .content_form import reads_parts
from .environment import environment

SECONDS = 3  # of processor time for one request
MEMORY = 1 << 30  # bytes of address space
LONGEST = 16 << 20  # characters of a prompt
SHOWN = 300


@lru_cache(maxsize=8)
def compiled(source: str):
    return environment().from_string(source)


@lru_cache(maxsize=8)
def content_form(source: str) -> str:
    return "parts" if reads_parts(environment().parse(source)) else "string"


def answer(request: dict) -> dict:
    try:
        template = compiled(request["source"])
        if request["variables"] is None:
            return {"text": content_form(request["source"])}
        text = template.render(request["variables"])
    except TemplateSyntaxError as error:
        return {"error": f"is not valid Jinja (line {error.lineno}: {error.message})"[:SHOWN]}
    except MemoryError:
        return {"error": "takes more memory than any prompt needs"}
    except RecursionError:
        return {"error": "is nested too deeply"}
    except Exception as error:  # a template is a program: it may fail in any way
        return {"error": f"cannot render these messages ({error})"[:SHOWN]}
    if len(text) > LONGEST:
        return {"error": f"makes a prompt of {len(text):,} characters; {LONGEST:,} are the most"}
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return {"error": "makes a prompt that is no text (half a surrogate pair)"}
    return {"text": text}


def allow(seconds: int):
    """The process may use so much more processor time from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, most))


def main():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        allow(SECONDS)
        result = answer(json.loads(line))
        sys.stdout.buffer.write(json.dumps(result).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
