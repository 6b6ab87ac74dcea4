"""The identities checked on a real forward when a model is loaded, and the points refused where they fail.

Imported by `probes.models.backends`, and by the command that compares backends.
"""
