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
        if found.name in PART_FILTERS and _is_content(found.node, names):
            return True
    accesses = tree.find_all((nodes.Getattr, nodes.Getitem))
    return any(_is_field_of_part(access, names) for access in accesses)


def _names_of_content(tree) -> set[str]:
    """Variables that a message's content is assigned to, and parameters of macros it is given to."""
    names = set()
    for assignment in tree.find_all(nodes.Assign):
        target = assignment.target
        if isinstance(target, nodes.Name) and _is_content(assignment.node, names):
            names.add(target.name)
    return names | _parameters_of_content(tree, names)


def _parameters_of_content(tree, names: set[str]) -> set[str]:
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    found = set()
    for call in tree.find_all(nodes.Call):
        macro = macros.get(getattr(call.node, "name", None))
        if macro is None:
            continue
        for parameter, argument in zip(macro.args, call.args):
            if _is_content(argument, names):
                found.add(parameter.name)
    return found


def _is_content(node, names: set[str]) -> bool:
    """Whether an expression is content, or what filters, slices and defaults leave of it."""
    if isinstance(node, nodes.Filter):
        return node.node is not None and _is_content(node.node, names)
    if isinstance(node, nodes.Or):
        return _is_content(node.left, names)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_content(node.node, names)
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Call):
        return _field(node.node) == "get" and _constant(node.args) == "content"
    return _field(node) == "content"


def _is_field_of_part(node, names: set[str]) -> bool:
    """content[0].text and the like."""
    if _field(node) not in PART_FIELDS or not isinstance(node.node, nodes.Getitem):
        return False
    return isinstance(_constant([node.node.arg]), int) and _is_content(node.node.node, names)


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
