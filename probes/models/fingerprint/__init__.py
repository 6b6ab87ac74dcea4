"""What a module computes, told from the module as it is now: checksums, parts, attributes, and code that is not its own."""
