"""Problem sets of the benchmark suites.

Each module has a table `ENTRIES` of `jaxopt_ext.bench.problem.Entry` by name. Importing a module
builds no problem.
"""
