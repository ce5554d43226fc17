"""Jobs: long pieces of work that wait in a queue, run in a process of their own, and survive whatever ends it."""
