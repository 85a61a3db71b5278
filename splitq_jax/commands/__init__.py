"""The command line's commands, a module each: its flags (``add_flags``) and what it does; each writes a folder whole or not at all."""
