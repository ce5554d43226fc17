"""Who answers, given what the router measured: one policy a file."""
