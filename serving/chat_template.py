"""A chat template of the user's own, read and checked before a model is loaded for minutes."""

from pathlib import Path

import jinja2

from atom.errors import AtomError


class TemplateError(AtomError):
    """A file is no chat template."""


def read_template(path: Path) -> str:
    """The template in a file; TemplateError if it cannot be read, or is not in Jinja's syntax."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise TemplateError(
            f"the chat template {path} cannot be read ({reason}); give a Jinja file, or leave out --chat-template."
        ) from None
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        if "tag 'generation'" not in str(error.message):  # transformers' own
            raise TemplateError(
                f"the chat template {path} is wrong in line {error.lineno} ({error.message}); correct it."
            ) from None
    return text
