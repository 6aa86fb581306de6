"""Benchmarks and the demo. Peers and plots are imported only where they are used."""

if __name__ != "jaxopt_ext.bench":  # reached as a bare folder of the checkout
    raise ImportError("import jaxopt_ext.bench, not bench")
