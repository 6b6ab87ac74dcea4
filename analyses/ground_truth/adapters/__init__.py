"""From the tables of each analysis to its answers, one file an analysis; an adapter reads tables alone and changes no method."""
