"""The sub-commands of `atom`: one module each, imported when it is called."""
