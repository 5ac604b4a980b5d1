"""Whether a chat template is Jinja at all. Without transformers, so that ``finetune plan`` can tell too."""

import re

from jinja2 import Environment, TemplateSyntaxError

_GENERATION = re.compile(r"{%[-+]?\s*(end)?generation\s*[-+]?%}")
"""A tag that only transformers knows: it marks what the assistant says."""


def syntax_error(template: str) -> str:
    """``line 3: unexpected '}'; mend it``; empty if the template can be read."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.parse(_GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        return f"is not valid Jinja: line {error.lineno}: {error.message}; mend it, or leave it out"
    except RecursionError:
        return "is nested too deep for Jinja"
    return ""
