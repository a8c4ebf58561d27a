"""lm-eval's own command line with the model `atom` registered: `python -m atom.eval.lm_eval --model atom ...`.

lm-eval 0.4.13 finds models in a table of its own and loads no plugins, so the class must be imported before the
command line starts; its documentation recommends this way. All its options work as ever.
"""

from lm_eval.__main__ import cli_evaluate

from . import lm  # noqa: F401  registers the model

if __name__ == "__main__":
    cli_evaluate()
