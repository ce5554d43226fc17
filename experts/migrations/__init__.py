"""How a registry's database of an older version becomes one of this version (Alembic).

A change of `tables.py` comes with a file in `versions/`, written like the ones there, and a new `tables.HEAD`. A test
upgrades an empty database and shows every difference that is left.
"""
