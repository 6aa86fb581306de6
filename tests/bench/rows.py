"""Made-up benchmark rows: several suites, failures, skipped peers and hostile text."""

import numpy as np

from jaxopt_ext.bench.record import Row

HOSTILE = (
    "bad <script>alert('x')</script> & \"quotes\" | pipe `tick` ∇f≤ε\n"
    "second line <img src=http://example.org/x>"
)
ENVIRONMENT = {
    "kind": "environment",
    "env_id": "abc123",
    "python": "3.11.7",
    "cpu": "Some CPU <fast> & cheap",
    "cores": 2,
    "load": [3.1, 2.9],
    "threads": {"OMP_NUM_THREADS": "1"},
    "x64": True,
    "noisy": True,
    "versions": {"jax": "0.10.2", "scipy": "1.17.1", "jaxopt_ext": "0.1.0"},
}
SOLVERS = [
    ("jaxopt_ext", "GradNormSmooth", "default", 1.0, 3.0),
    ("jaxopt_ext", "SSO", "default", 1.6, 1.2),
    ("jaxopt_ext", "SSO", "tuned", 1.3, 1.1),
    ("scipy", "L-BFGS-B", "default", 2.4, 1.0),
    ("jaxopt", "LBFGS", "default", 2.0, 2.0),
    ("optimistix", "BFGS", "default", 1.8, 1.5),
    ("optax", "lbfgs", "default", 3.0, 2.2),
]


def history(rng, f0, f_star, work, rate):
    x = np.unique(np.geomspace(1, work, 25).round())
    f = f_star + (f0 - f_star) * np.exp(-rate * x / work) * rng.uniform(0.8, 1.0, len(x))
    f[0] = f0
    return {"work": x.tolist(), "f": np.minimum.accumulate(f).tolist()}


def solved_rows(suite="smooth", problems=12, seeds=(0,), known=True, seed=0):
    """A suite of minimization problems; contenders differ by fixed factors and by chance."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(problems):
        n = int(rng.integers(2, 60))
        f0, f_star = float(rng.uniform(10, 1000)), float(rng.normal())
        base = float(rng.uniform(20, 400))
        for package, solver, setting, work_factor, time_factor in SOLVERS:
            for s in seeds:
                work = float(np.ceil(base * work_factor * rng.lognormal(0, 0.3)))
                cpu = 1e-4 * base * time_factor * rng.lognormal(0, 0.2)
                fails = rng.uniform() < 0.08
                trace = history(rng, f0, f_star, work, 3 if fails else 25)
                f = trace["f"][-1]
                rows.append(
                    Row(
                        suite=suite,
                        problem=f"problem {p:02d}",
                        package=package,
                        solver=solver,
                        setting=setting,
                        seed=s,
                        env_id="abc123",
                        status="missed" if fails else "ok",
                        message=HOSTILE if fails else "",
                        n=n,
                        f0=f0,
                        f=f,
                        f_star=f_star if known else None,
                        error=f - f_star,
                        tolerance=1e-6,
                        iterations=int(work // 3),
                        counts={"value": int(work // 2), "gradient": int(work // 4)},
                        work=work,
                        compile_cpu_s=float(rng.uniform(0.2, 4)),
                        run_cpu_s=[cpu, cpu * 1.1],
                        run_wall_s=[cpu * 3],
                        peak_bytes=int(rng.integers(1, 99)) * 2**20,
                        history=trace,
                    )
                )
    return rows


def scale_rows():
    """Cost against size; theory for one contender."""
    rng = np.random.default_rng(2)
    return [
        Row(
            suite="scale",
            problem=f"ridge n={n}",
            package=package,
            solver=solver,
            n=n,
            params={"family": "ridge"},
            run_cpu_s=[1e-7 * n**power * rng.lognormal(0, 0.1)],
            extras={"theory": {"cpu": power}} if package == "jaxopt_ext" else {},
        )
        for n in (10, 30, 100, 300, 1000)
        for package, solver, power in [("jaxopt_ext", "SSO", 2.0), ("scipy", "L-BFGS-B", 1.0)]
    ]


def implicit_rows():
    """No work, no objective: an error, two times, a nested extra."""
    return [
        Row(
            suite="implicit",
            problem=problem,
            package=package,
            solver=solver,
            error=error * (1 + i),
            compile_cpu_s=0.3 * (1 + i),
            run_cpu_s=[1e-4 * time],
            extras={"linear_solver": "cg", "condition": 1e3, "nested": {"a": 1}},
        )
        for i, problem in enumerate(["ridge", "kkt", "lasso"])
        for package, solver, error, time in [
            ("jaxopt_ext", "ImplicitAdjoint", 1e-12, 3),
            ("jaxopt", "implicit_diff", 1e-9, 2),
        ]
    ]


def transform_rows():
    """Throughput at several batches: a rate among the extras, the larger the better."""
    return [
        Row(
            suite="transform",
            problem=f"rosenbrock, batch {batch}",
            package=package,
            solver=solver,
            compile_cpu_s=1.0 + batch / 1000,
            extras={"batch": batch, "instances_per_s": rate * batch**0.8},
        )
        for batch in (1, 32, 1024)
        for package, solver, rate in [("jaxopt_ext", "SSO", 50.0), ("optimistix", "BFGS", 200.0)]
    ]


def odd_rows():
    """Skipped, crashed and constrained rows."""
    skipped = {"package": "cyipopt", "solver": "IPOPT", "status": "skipped", "message": HOSTILE}
    program = {"suite": "nlp", "problem": "HS71 <b>", "n": 4, "m": 2, "f0": 16.0}
    return [
        Row(suite="smooth", problem="*", **skipped),
        Row(suite="nlp", problem="*", **skipped),
        Row(
            **program,
            package="jaxopt_ext",
            solver="SketchedNewtonAL",
            f=17.014,
            work=90.0,
            violation=1e-9,
            tolerance=1e-6,
            run_cpu_s=[0.01],
        ),
        Row(
            **program,
            package="scipy",
            solver="SLSQP",
            f=float("nan"),
            status="nonfinite",
            message=HOSTILE,
            violation=1.0,
            tolerance=1e-6,
        ),
        Row(**program, package="scipy", solver="trust-constr", status="error", message=HOSTILE),
        Row(**program, package="slsqp_jax", solver="a" * 60, status="timeout", message="> 60 s"),
    ]


def every_row():
    return [
        *solved_rows(),
        *solved_rows("blackbox", problems=5, seeds=(0, 1, 2), known=False, seed=1),
        *odd_rows(),
        *scale_rows(),
        *implicit_rows(),
        *transform_rows(),
    ]
