"""The dashboard: draws saved runs, and hands new ones to a worker process. Run as a script, never imported by a package."""
