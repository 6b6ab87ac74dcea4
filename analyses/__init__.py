"""The published methods, a folder each, with results, runs, studies and commands; on `probes` alone, and below `app`."""

import probes as probes  # first of all, because it decides how torch's threads wait
