"""One module a migration, in the order that `down_revision` gives them."""
