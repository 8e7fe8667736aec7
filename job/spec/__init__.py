"""The YAML spec of a job: its schema, and loading it with line numbers and overrides.

`job validate` and `job schema` use this room alone, so nothing heavy is imported at module level.
It does not read datasets or models; `pinning` asks the Hub for commits and nothing else.
"""
