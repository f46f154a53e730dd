"""Which form of content a chat template reads. Takes its syntax tree, returns whether it is parts.

Read off the source once, as vLLM does: a template that goes through a message's content expects
OpenAI's parts; any other one puts a string into the prompt.
"""

from jinja2 import nodes

PART_FIELDS = ("type", "text")
PART_FILTERS = ("selectattr", "rejectattr", "map")  # pick parts out of content without a loop


def reads_parts(tree) -> bool:
    """Whether the template with this jinja2 tree reads content as a list of parts."""
    names = _names_of_content(tree)
    if any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For)):
        return True
    for found in tree.find_all(nodes.Filter):
        by_attribute = any(argument.key == "attribute" for argument in found.kwargs)
        if (found.name in PART_FILTERS or by_attribute) and _is_content(found.node, names):
            return True
    accesses = tree.find_all((nodes.Getattr, nodes.Getitem))
    return any(_is_field_of_part(access, names) for access in accesses)


def _names_of_content(tree) -> set[str]:
    """Variables that a message's content is assigned or given to; "n.x" in a namespace n."""
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    names = set()
    for _ in range(2):  # a macro's own variables stand in front of the calls that give it content
        for found in tree.find_all((nodes.Assign, nodes.With, nodes.Call)):
            for name, value in _given(found, macros):
                if name and _is_content(value, names):
                    names.add(name)
    return names


def _given(node, macros: dict) -> list[tuple]:
    """(name, value) pairs of an assignment, a {% with %} or the call of a macro."""
    if isinstance(node, nodes.Assign):
        return [(_name(node.target), node.node)]
    if isinstance(node, nodes.With):
        return list(zip(map(_name, node.targets), node.values))
    macro = macros.get(_name(node.node))
    if macro is None:
        return []
    named = [(argument.key, argument.value) for argument in node.kwargs]
    return [*zip(map(_name, macro.args), node.args), *named]


def _name(node) -> str | None:
    """x of a variable, "n.x" of a namespace's; None for other expressions."""
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return f"{node.node.name}.{node.attr}"
    return node.name if isinstance(node, nodes.Name) else None


def _is_content(node, names: set[str]) -> bool:
    """Whether an expression is content, or what filters, slices and defaults leave of it."""
    if isinstance(node, nodes.Filter):
        return node.node is not None and _is_content(node.node, names)
    if isinstance(node, nodes.Or):
        return _is_content(node.left, names)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_content(node.node, names)
    if isinstance(node, nodes.Call):
        return _field(node.node) == "get" and _constant(node.args) == "content"
    return _name(node) in names or _field(node) == "content"


def _is_field_of_part(node, names: set[str]) -> bool:
    """content[0].text, content[i]['type'], (content | first).text and the like."""
    if _field(node) not in PART_FIELDS:
        return False
    part = node.node
    if isinstance(part, nodes.Filter):
        return part.name in ("first", "last") and _is_content(part.node, names)
    if not isinstance(part, nodes.Getitem) or isinstance(_constant([part.arg]), str):
        return False
    return _is_content(part.node, names)


def _field(node):
    """b of a.b and a['b']; None for other expressions."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem):
        return _constant([node.arg])
    return None


def _constant(arguments: list):
    """The value of the first argument; None if it is known only when it is computed."""
    try:
        return arguments[0].as_const()
    except (IndexError, nodes.Impossible):
        return None
