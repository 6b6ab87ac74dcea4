"""The published methods, a folder each, with results, runs, studies and commands; on `probes` alone, and below `app`."""
