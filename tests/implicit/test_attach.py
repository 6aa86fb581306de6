"""The one differentiation rule, under every transformation, against closed forms."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxopt_ext import implicit

MODES = {
    "fwd-rev": lambda f: jax.jacfwd(jax.grad(f)),
    "rev-rev": lambda f: jax.jacrev(jax.grad(f)),
    "rev-fwd": lambda f: jax.jacrev(jax.jacfwd(f)),
    "fwd-fwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
}


def closed_form(t):
    """The root of x³ + x = t."""
    scale = jnp.asarray(3, t.dtype) ** 0.5
    return 2 / scale * jnp.sinh(jnp.arcsinh(3 * scale * t / 2) / 3)


def cubic(x, t):
    return x**3 + x - t


def newton(x, t):
    def body(carry):
        i, x = carry
        return i + 1, x - cubic(x, t) / (3 * x**2 + 1)

    return jax.lax.while_loop(lambda carry: carry[0] < 40, body, (0, x))[1]


def root(t, linear_solver=None):
    solver = implicit.differentiable(implicit.Root(cubic), linear_solver=linear_solver)(newton)
    return solver(jnp.zeros_like(t), t)


SOLVERS = {"auto": None, "cg": implicit.CG(), "gmres": implicit.GMRES()}


def outer(f):
    return lambda t: jnp.sum(jnp.sin(f(t)))


T = jnp.array([0.7, -1.3])


@pytest.mark.parametrize("linear_solver", SOLVERS.values(), ids=SOLVERS)
def test_first_order(linear_solver):
    f = functools.partial(root, linear_solver=linear_solver)
    v = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(f(T), closed_form(T), rtol=1e-12)
    np.testing.assert_allclose(
        jax.jvp(f, (T,), (v,))[1], jax.jvp(closed_form, (T,), (v,))[1], rtol=1e-9
    )
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jacobian(f)(T), jacobian(closed_form)(T), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("linear_solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("mode", MODES)
def test_second_order(mode, linear_solver):
    f = functools.partial(root, linear_solver=linear_solver)
    ours = jax.jit(MODES[mode](outer(f)))(T)
    np.testing.assert_allclose(ours, jax.hessian(outer(closed_form))(T), rtol=1e-8, atol=1e-10)


def test_third_order():
    f, g = outer(root), outer(closed_form)
    third = jax.jacfwd(jax.jacrev(jax.grad(f)))(T)
    np.testing.assert_allclose(third, jax.jacfwd(jax.jacfwd(jax.grad(g)))(T), rtol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_second_order_inside_scan(mode):
    """A rule on `jax.custom_jvp` gives a silently wrong answer here (see the test below)."""

    def through_scan(f):
        def g(t):
            def body(carry, _):
                x = f(carry)
                return carry + 0.1 * x, jnp.sum(x**2)

            return jnp.sum(jax.lax.scan(body, t, None, length=3)[1])

        return g

    ours = MODES[mode](through_scan(root))(T)
    np.testing.assert_allclose(ours, MODES[mode](through_scan(closed_form))(T), rtol=1e-9)


def test_ten_line_case_that_a_custom_jvp_rule_fails():
    """y(t) = t³ with the rule 3 y/t, which reads its own output as an implicit rule must."""

    @jax.custom_jvp
    def custom(t):
        return jax.lax.stop_gradient(t) ** 3

    @custom.defjvp
    def _(primals, tangents):
        (t,), (dt,) = primals, tangents
        y = custom(t)
        return y, 3 * y / t * dt

    def ours(t):
        return implicit.attach(lambda y, t: y - t**3, jax.lax.stop_gradient(t) ** 3, t)

    def second_derivative(f):
        return jax.hessian(lambda t: jax.lax.scan(lambda c, _: (f(c), None), t, jnp.arange(1))[0])(
            1.5
        )

    np.testing.assert_allclose(second_derivative(ours), 9.0, rtol=1e-12)
    if not np.isclose(float(second_derivative(custom)), 9.0):
        np.testing.assert_allclose(second_derivative(custom), -4.5)  # what JAX 0.10 gives


@pytest.mark.parametrize("loop", ["fori", "map", "cond", "remat", "jit"])
def test_second_order_inside_other_control_flow(loop):
    def inside(f):
        def g(t):
            if loop == "fori":
                return jnp.sum(jax.lax.fori_loop(0, 2, lambda i, c: c + f(c), t))
            if loop == "map":
                return jnp.sum(jax.lax.map(f, jnp.stack([t, 2 * t])))
            if loop == "cond":
                return jnp.sum(jax.lax.cond(t[0] > 0, f, lambda t: t, t))
            return jnp.sum((jax.checkpoint(f) if loop == "remat" else jax.jit(f))(t) ** 2)

        return g

    for mode in ("fwd-rev", "rev-rev"):
        ours, truth = MODES[mode](inside(root))(T), MODES[mode](inside(closed_form))(T)
        np.testing.assert_allclose(ours, truth, rtol=1e-9, atol=1e-12)


def test_forward_mode_through_a_while_loop():
    def g(f):
        return lambda t: jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + f(c[1])), (0, t)
        )[1]

    np.testing.assert_allclose(jax.jacfwd(g(root))(T), jax.jacfwd(g(closed_form))(T), rtol=1e-10)


def test_vmap_of_everything():
    batch = jnp.stack([T, 2 * T, -T])
    for transform in (jax.grad, jax.hessian, MODES["rev-rev"]):
        ours = jax.vmap(transform(outer(root)))(batch)
        np.testing.assert_allclose(
            ours, jax.vmap(transform(outer(closed_form)))(batch), rtol=1e-9, atol=1e-12
        )
    total = jax.grad(lambda b: jnp.sum(jax.vmap(outer(root))(b)))(batch)
    np.testing.assert_allclose(total, jax.vmap(jax.grad(outer(closed_form)))(batch), rtol=1e-10)
    twice = jax.vmap(jax.vmap(jax.grad(lambda t: outer(root)(t[None]))))(batch)
    np.testing.assert_allclose(twice, total, rtol=1e-10)


def test_batch_axes_other_than_the_first_and_unbatched_parameters():
    weights = jnp.array([1.0, 2.0])

    def f(x, t, w):
        return implicit.attach(lambda x, t, w: w * x - t, x, t, w)

    t = jnp.arange(6.0).reshape(2, 3)
    x = t / weights[:, None]
    g = jax.vmap(jax.grad(lambda t, x: jnp.sum(f(x, t, weights) ** 2)), in_axes=1, out_axes=1)
    np.testing.assert_allclose(g(t, x), 2 * t / weights[:, None] ** 2)
    only_parameters = jax.vmap(jax.grad(lambda t, w: f(jnp.array(1.0), t, w), 1), (None, 0))
    np.testing.assert_allclose(only_parameters(1.0, weights), -1 / weights)


def test_closures_over_traced_values():
    def loss(t):
        solver = implicit.differentiable(implicit.Root(lambda x: cubic(x, t)))
        return jnp.sum(jnp.sin(solver(lambda x: newton(x, t))(jnp.zeros_like(t))))

    truth = outer(closed_form)
    np.testing.assert_allclose(jax.grad(loss)(T), jax.grad(truth)(T), rtol=1e-10)
    np.testing.assert_allclose(jax.jacfwd(loss)(T), jax.grad(truth)(T), rtol=1e-10)
    np.testing.assert_allclose(jax.hessian(loss)(T), jax.hessian(truth)(T), rtol=1e-10, atol=1e-13)
    batch = jnp.stack([T, 2 * T])
    np.testing.assert_allclose(
        jax.vmap(jax.grad(loss))(batch), jax.vmap(jax.grad(truth))(batch), rtol=1e-10
    )


def test_closure_of_a_jitted_closure():
    X = jnp.array([[1.0, 0.5], [0.2, 2.0], [1.0, -1.0]])
    y = jnp.array([1.0, -1.0, 0.5])

    def loss(scale):
        scaled = X * jnp.exp(scale)

        @jax.jit
        def ridge(w):
            return jnp.sum((scaled @ w - y) ** 2) / 2 + jnp.sum(w**2) / 2

        w = jnp.linalg.solve(scaled.T @ scaled + jnp.eye(2), scaled.T @ y)
        return jnp.sum(implicit.attach(implicit.Stationary(ridge), w) ** 2)

    def closed(scale):
        scaled = X * jnp.exp(scale)
        return jnp.sum(jnp.linalg.solve(scaled.T @ scaled + jnp.eye(2), scaled.T @ y) ** 2)

    for transform in (jax.grad, jax.hessian):
        np.testing.assert_allclose(jax.jit(transform(loss))(0.3), transform(closed)(0.3), rtol=1e-9)


class Layer(eqx.Module):
    weight: jax.Array
    name: str = eqx.field(static=True)


def test_trees_modules_integers_keys_and_strings_pass_through():
    def condition(x, args, tag):
        assert tag == "kept"
        noise = jax.random.normal(args["key"], ()).astype(x["a"].dtype)
        return {
            "a": x["a"] * args["layer"].weight - args["n"].astype(x["a"].dtype) - noise * 0,
            "b": (x["b"][0] - x["a"].sum(),),
        }

    args = {
        "layer": Layer(jnp.array([2.0, 4.0]), "dense"),
        "n": jnp.array(3),
        "key": jax.random.key(0),
        "none": None,
    }

    def attached(weight):
        here = {**args, "layer": Layer(weight, "dense")}
        found = {"a": 3.0 / jnp.array([2.0, 4.0]), "b": (jnp.array(2.25),)}
        x = implicit.attach(condition, found, here, "kept")
        return x["b"][0]

    weight = jnp.array([2.0, 4.0])
    np.testing.assert_allclose(attached(weight), 2.25)
    np.testing.assert_allclose(jax.grad(attached)(weight), -3 / weight**2)


def test_integer_arguments_can_be_differentiated_around():
    def f(args):
        t, n = args
        return implicit.attach(lambda x, t, n: x * n.astype(x.dtype) - t, t / 3, t, n)

    gradient = jax.grad(f, allow_int=True)((jnp.array(6.0), jnp.array(3)))
    np.testing.assert_allclose(gradient[0], 1 / 3)
    assert gradient[1].dtype == jax.dtypes.float0


def test_aux_is_returned_detached_and_the_start_has_no_derivative():
    @implicit.differentiable(implicit.Root(cubic), has_aux=True)
    def solver(x, t):
        return newton(x, t), {"steps": jnp.array(40), "twice": 2 * t}

    x, aux = solver(jnp.zeros(2), T)
    np.testing.assert_allclose(x, closed_form(T), rtol=1e-12)
    assert int(aux["steps"]) == 40
    assert not np.any(jax.grad(lambda t: jnp.sum(solver(t, t)[1]["twice"]))(T))
    assert not np.any(jax.grad(lambda x: jnp.sum(solver(x, T)[0]))(jnp.zeros(2)))


def test_host_solver_eager_and_through_pure_callback():
    def on_host(x, t):
        return np.asarray(np.cbrt(np.asarray(t)))  # concrete values only

    cube_root = implicit.differentiable(implicit.Root(lambda x, t: x**3 - t))(on_host)
    t = jnp.array([8.0, 27.0])
    expected = np.cbrt(t) / t / 3
    np.testing.assert_allclose(jax.grad(lambda t: jnp.sum(cube_root(t, t)))(t), expected)

    @implicit.differentiable(implicit.Root(lambda x, t: x**3 - t))
    def through_callback(x, t):
        shape = jax.ShapeDtypeStruct(t.shape, t.dtype)
        return jax.pure_callback(lambda t: np.cbrt(t), shape, t, vmap_method="sequential")

    gradient = jax.jit(jax.grad(lambda t: jnp.sum(through_callback(t, t))))(t)
    np.testing.assert_allclose(gradient, expected)
    batch = jax.vmap(jax.grad(lambda t: through_callback(t, t)))(t)
    np.testing.assert_allclose(batch, expected)


def test_nested_levels():
    """The condition of the outer problem contains an inner attached solve."""

    def inner(u):
        return implicit.attach(lambda x, u: x - u**2, jax.lax.stop_gradient(u) ** 2, u)

    def outer_solution(t):  # u with inner(u) = u² = t
        u = jnp.sqrt(jax.lax.stop_gradient(t))
        return implicit.attach(lambda u, t: inner(u) - t, u, t)

    np.testing.assert_allclose(jax.grad(outer_solution)(4.0), 0.25)
    np.testing.assert_allclose(jax.hessian(outer_solution)(4.0), -1 / 32)


def test_python_float_and_float32():
    def f(t):
        return implicit.attach(lambda x, t: x**2 - t, jnp.float32(2.0), t)

    assert f(4.0).dtype == jnp.float32
    gradient = jax.grad(f)(jnp.float32(4.0))
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, 0.25)
    double = jax.grad(lambda t: implicit.attach(lambda x, t: x**2 - t, jnp.array(2.0), t))
    np.testing.assert_allclose(double(4.0), 0.25)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
def test_complex_root_of_a_holomorphic_condition(dtype):
    t = jnp.asarray(1.0 + 2.0j, dtype)

    def square_root(t):
        return implicit.attach(lambda x, t: x**2 - t, jnp.sqrt(jax.lax.stop_gradient(t)), t)

    tolerance = 1e-5 if dtype == jnp.complex64 else 1e-12
    expected = 1 / (2 * jnp.sqrt(t))
    np.testing.assert_allclose(jax.grad(square_root, holomorphic=True)(t), expected, rtol=tolerance)
    np.testing.assert_allclose(
        jax.jvp(square_root, (t,), (jnp.ones_like(t),))[1], expected, rtol=tolerance
    )
    second = jax.grad(jax.grad(square_root, holomorphic=True), holomorphic=True)(t)
    np.testing.assert_allclose(second, -1 / (4 * t * jnp.sqrt(t)), rtol=tolerance)


def test_cotangents_of_any_size_give_the_same_relative_gradient():
    for linear_solver in SOLVERS.values():
        for dtype, scales in ((jnp.float64, (1e-30, 1e30)), (jnp.float32, (1e-30, 1e30))):
            t = T.astype(dtype)

            def loss(t, scale, linear_solver=linear_solver):
                return scale.astype(t.dtype) * jnp.sum(root(t, linear_solver))

            unit = jax.grad(loss)(t, jnp.array(1.0))
            for scale in scales:
                scaled = jax.grad(loss)(t, jnp.array(scale)) / jnp.asarray(scale, dtype)
                np.testing.assert_allclose(
                    scaled, unit, rtol=1e-4 if dtype == jnp.float32 else 1e-9
                )


def test_nothing_is_solved_unless_a_derivative_is_taken():
    jaxpr = str(jax.make_jaxpr(lambda t: implicit.attach(cubic, closed_form(t), t))(T))
    assert "implicit_attach" in jaxpr
    assert "lu" not in jaxpr
    gradient = jax.make_jaxpr(jax.jacrev(lambda t: implicit.attach(cubic, closed_form(t), t)))(T)
    assert str(gradient).count(" lu") == 1  # one factorization for all rows


@pytest.mark.parametrize("linear_solver", [None, implicit.CG()], ids=["dense", "cg"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_on_eight_devices(check_vma, linear_solver):
    mesh = jax.make_mesh((8,), ("lane",), axis_types=(AxisType.Auto,))
    f = functools.partial(root, linear_solver=linear_solver)
    sharded = jax.shard_map(
        jax.vmap(f), mesh=mesh, in_specs=P("lane"), out_specs=P("lane"), check_vma=check_vma
    )
    batch = jnp.linspace(0.5, 2.0, 32).reshape(16, 2)
    ours = jax.grad(lambda b: jnp.sum(sharded(b) ** 2))(batch)
    truth = jax.grad(lambda b: jnp.sum(closed_form(b) ** 2))(batch)
    np.testing.assert_allclose(ours, truth, rtol=1e-9)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("linear_solver", [None, implicit.CG()], ids=["dense", "cg"])
def test_value_gradient_and_hessian_export(platform, linear_solver):
    loss = outer(functools.partial(root, linear_solver=linear_solver))
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    for derivative in (loss, jax.grad(loss), jax.hessian(loss)):
        exported = export.export(jax.jit(derivative), platforms=[platform])(shape)
        assert exported.platforms == (platform,)
        assert "xla_python_cpu_callback" not in exported.mlir_module()
        assert "xla_ffi_python" not in exported.mlir_module()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: implicit.attach(lambda x: jnp.ones(3) * x.sum(), jnp.zeros(2)),
            ValueError,
            r"must return a PyTree like x: it returned float64\[3\], expected float64\[2\]",
        ),
        (
            lambda: implicit.attach(lambda x: x, jnp.zeros(2, int)),
            TypeError,
            "x has dtype int64, expected a floating dtype",
        ),
        (
            lambda: implicit.attach(lambda x: x, {"k": jnp.array(True)}),
            TypeError,
            r"x\['k'\] has dtype bool",
        ),
        (
            lambda: implicit.differentiable(lambda x: x, has_aux=True)(lambda x: x)(1.0),
            TypeError,
            r"expected a pair \(x, aux\) because has_aux=True",
        ),
        (
            lambda: implicit.attach(lambda x, t: x, jnp.zeros(2)),
            TypeError,
            "missing 1 required positional argument: 't'",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_hoisting_finds_every_captured_array_and_keeps_one_program():
    def make(scale):
        def fun(x, label):
            assert label == "kept"
            return scale.astype(x.dtype) * x + np.ones(2, x.dtype)

        return fun

    fun = make(jnp.array(2.0))
    first = implicit.hoist(fun, jnp.zeros(2), "kept")
    again = implicit.hoist(fun, jnp.ones(2), "kept")
    assert first.program == again.program  # compiled code is found again
    assert hash(first.program) == hash(again.program)
    assert implicit.hoist(make(jnp.array(2.0)), jnp.zeros(2), "kept").program != first.program
    assert implicit.hoist(fun, jnp.zeros(2, jnp.float32), "kept").program != first.program
    np.testing.assert_array_equal(first(jnp.array([1.0, 2.0]), "kept"), [3.0, 5.0])
    with pytest.raises(TypeError, match="arguments of other types"):
        first(jnp.zeros(3), "kept")
    assert implicit.hoist(first, jnp.zeros(2), "kept") is first


def test_condition_with_a_forward_derivative_only():
    """A `while_loop` inside the condition: jvp and jacfwd work, as they do for the loop itself."""

    def condition(x, t):
        halves = jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x / 2 + x), (0, x)
        )[1]
        return halves + x - t

    def solution(t):
        return implicit.attach(condition, jnp.zeros(2), t)

    np.testing.assert_allclose(jax.jacfwd(solution)(jnp.zeros(2)), np.eye(2) / 2)
