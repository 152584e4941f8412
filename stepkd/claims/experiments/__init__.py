"""One experiment per file, found by the file's name; each has an ``EXPERIMENT`` (:class:`stepkd.claims.Experiment`)."""
