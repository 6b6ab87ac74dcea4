"""Whether a module still computes what it did, and what else than its saved weights decides that.

`sources.digest` names the weights, once, for the store's keys. The files here compare a module with itself at another
moment (`fingerprint`, by `checksum` and `description`), with its class built anew (`plain_model`), and with the code
that was put on it (`foreign_code`). Imported by `probes.models.backends`.
"""
