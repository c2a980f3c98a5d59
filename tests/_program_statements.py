"""The statements of which `_programs` makes programs: details are drawn from a number."""

import math

from ._program_writer import Writer, statement

# ---- layers ----


def _layer(w: Writer, source: str, shape: tuple[int, ...], out: int | None = None) -> str:
    dense = w.chance(0.25) and not w.low_precision
    bias = "" if w.chance(0.5) else ", bias=False"
    if len(shape) in (3, 4) and shape[1] in (4, 6, 8) and min(shape[2:]) >= 3 and w.chance(0.9):
        k, s, g = w.one_of(1, 3, 3), w.one_of(1, 1, 1, 2), w.one_of(1, 1, 1, 2)
        out = w.one_of(4, 6, 8, shape[1]) if out is None else out
        if out != shape[1] and out % g:
            g = 1
        stride = f", stride={s}" * (s > 1)
        made = (f"nn.Conv{len(shape) - 2}d({shape[1]}, {out}, {k}, padding={k // 2}{stride}{f', groups={g}' * (g > 1)}"
                f"{bias})")  # fmt: skip
        new = (shape[0], out, *((n - 1) // s + 1 for n in shape[2:]))
        channels = (len(shape), shape[1])
    else:
        out = w.one_of(4, 6, 8, shape[-1]) if out is None else out
        dense = dense and len(shape) == 2  # of more dimensions torch gives views
        made, new = f"nn.Linear({shape[-1]}, {out}{bias})", (*shape[:-1], out)
        channels = (0, shape[-1])
    name = w.module(made if dense else f"pruned({made})", channels)
    return w.new(new, f"{name}({source})")


def _norm(w: Writer, source: str, shape: tuple[int, ...]) -> str:
    few = 1 < math.prod(shape) // shape[1] < 6  # whose gradients nearly cancel
    if not few and (len(shape) != 3 or w.chance(0.7)):
        d, options = max(len(shape) - 2, 1), ["affine=False"] * w.chance(0.15)
        options += ["track_running_stats=False"] * w.chance(0.1) + ["momentum=None"] * w.chance(0.1)
        name = w.module(f"norm(nn.BatchNorm{d}d({', '.join([str(shape[1]), *options])}))", (-len(shape), shape[1]))
    else:
        name = w.module(f"nn.LayerNorm({shape[-1]})")
    return w.new(shape, f"{name}({source})")


_ACTIVATIONS = ("relu", "relu", "relu", "relu", "relu6", "hardtanh", "leaky_relu", "silu", "hardswish", "gelu",
                "sigmoid", "tanh")  # fmt: skip
_MODULES = {"relu": "ReLU", "relu6": "ReLU6", "hardtanh": "Hardtanh", "leaky_relu": "LeakyReLU", "silu": "SiLU",
            "hardswish": "Hardswish"}  # fmt: skip


def _act(w: Writer, source: str, shape: tuple[int, ...]) -> str:
    name = w.one_of(*_ACTIVATIONS)
    in_place = w.chance(0.4) and source in w.own
    if name in _MODULES and w.chance(0.4):
        return w.new(shape, f"{w.module(f'nn.{_MODULES[name]}(inplace={in_place})')}({source})")
    if name in _MODULES and w.chance(0.5):
        return w.new(shape, f"F.{name}({source}, inplace={in_place})")
    if name == "relu":
        forms = ("torch.relu_({})", "{}.relu_()", "F.relu_({})") if in_place else ("torch.relu({})", "{}.relu()")
        return w.new(shape, w.one_of(*forms).format(source))
    if name == "gelu":
        return w.new(shape, w.one_of("F.gelu({})", "F.gelu({}, approximate='tanh')").format(source))
    if name in ("sigmoid", "tanh"):
        return w.new(shape, f"{source}.{name}()")
    return w.new(shape, f"F.{name}({source})")


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4


def _has_features(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and max(shape[1:]) < 40 and 0 not in shape[1:]


def _has_channels(shape: tuple[int, ...]) -> bool:
    return 2 <= len(shape) <= 4 and shape[1] < 40 and math.prod(shape[1:]) > 0


@statement(6)
def layer(w):
    source, shape = w.tensor(_has_features)
    return source and _layer(w, source, shape)


@statement(4)
def norm(w):
    source, shape = w.tensor(_has_channels)
    return source and _norm(w, source, shape)


@statement(8)
def chain(w):
    """Layer, normalisation, activation and addition in one of the usual orders."""
    source, shape = w.tensor(_has_features)
    if source is None:
        return
    name = _layer(w, source, shape)
    shape = w.tensors[-1][1]
    if w.chance(0.7) and _has_channels(shape):
        name = _norm(w, name, shape)
    parts = w.one_of("a", "a", "+", "+a", "a+", "")
    for part in parts:
        others = [n for n, s in w.tensors if s == shape and n != name]
        if part == "a":
            name = _act(w, name, shape)
        elif others:
            name = _add(w, name, w.rng.choice(others), shape)
    w.write(f"log.look({name!r}, {name})")


@statement(7)
def act(w):
    source, shape = w.tensor()
    return _act(w, source, shape)


@statement(3)
def again(w):
    """A layer or a normalisation that was called before."""
    found = [(m, e, d, c) for m, e, (d, c) in [m for m in w.modules if m[2]] if "stride" not in e]
    if not found:
        return
    m, expression, dims, channels = w.rng.choice(found)
    if dims == 0:
        source, shape = w.tensor(lambda s: len(s) > 1 and s[-1] == channels)
        new = (*shape[:-1], int(expression.split(", ")[1].split(")")[0])) if source else ()
    elif dims < 0:
        source, shape = w.tensor(lambda s: len(s) == -dims and s[1] == channels)
        new = shape
    else:
        source, shape = w.tensor(lambda s: len(s) == dims and s[1] == channels)
        new = (shape[0], int(expression.split(", ")[1]), *shape[2:]) if source else ()
    if source:
        w.new(new, f"self.{m}({source})")


@statement(3)
def sequential(w):
    """A Sequential that is called as a whole, sliced, part after part, or checkpointed."""
    source, shape = w.tensor(lambda s: _is_image(s) and min(s[2:]) >= 3 and s[1] in (4, 6, 8))
    if not source:
        return
    c = shape[1]
    conv, bn = f"pruned(nn.Conv2d({c}, {c}, 3, padding=1))", f"norm(nn.BatchNorm2d({c}))"
    parts = w.one_of([conv, bn, "nn.ReLU(inplace=True)", conv], [bn, "nn.ReLU()", conv], [conv, "nn.ReLU()", conv, bn],
                     [conv, bn, "nn.Identity()", "nn.ReLU6()", "nn.Dropout(0.0)", conv, "nn.GELU()"])  # fmt: skip
    name = w.module(f"nn.Sequential({', '.join(parts)})")
    form = w.one_of("{m}({x})", "{m}[:2]({x})", "{m}[2:]({m}[:2]({x}))",
                    "checkpoint_sequential({m}, 2, {x}, use_reentrant=False)",
                    "checkpoint({m}, {x}, use_reentrant=True)", "checkpoint({m}, {x}, use_reentrant=False)",
                    "log.one_after_the_other({m}, {x})")  # fmt: skip
    w.new(shape, form.format(m=name, x=source))


@statement(1)
def recursion(w):
    source, shape = w.tensor(lambda s: _is_image(s) and min(s[2:]) >= 3 and s[1] in (4, 6, 8))
    if source:
        w.new(shape, f"{w.module(f'Recursive({shape[1]})')}({source}, {w.one_of(1, 2, 2)})")


@statement(2)
def quiet(w):
    """What gives its input back."""
    source, shape = w.tensor()
    w.new(shape, w.one_of("F.dropout({}, 0.0)", "F.dropout({}, 0.5, training=False)", "nn.Identity()({})",
                          "F.dropout({}, 0.0, True, True)",
                          f"{w.module('nn.Dropout(0.0)')}({{}})").format(source))  # fmt: skip


@statement(2)
def pool(w):
    source, shape = w.tensor(_is_image)
    if not source or not w.viewing:
        return
    if min(shape[2:]) >= 4 and w.chance(0.6):
        form = w.one_of("F.max_pool2d({}, 2)", "F.avg_pool2d({}, 2)")
        w.new((*shape[:2], *(n // 2 for n in shape[2:])), form.format(source))
    elif w.chance(0.5):
        w.new((*shape[:2], 1, 1), f"F.adaptive_avg_pool2d({source}, 1)")
    else:
        w.new((shape[0], math.prod(shape[1:])), f"{source}.flatten(1)")


# ---- arithmetic, aliases, views ----


def _add(w: Writer, a: str, b: str, shape: tuple[int, ...]) -> str:
    if w.chance(0.6):
        if a == b:  # no difference of a tensor and itself, whose channels would be constant
            return w.new(shape, w.one_of("{a} + {a}", "torch.add({a}, {a})", "sum([{a}, {a}])").format(a=a))
        form = w.one_of("{a} + {b}", "{b} + {a}", "torch.add({a}, {b})", "{a}.add({b})",
                        "torch.add({a}, {b}, alpha=0.5)",
                        "torch.add({b}, other={a})", "sum([{a}, {b}])", "{a} - {b}")  # fmt: skip
        return w.new(shape, form.format(a=a, b=b))
    if a not in w.own:
        a, b = b, a
    if a in w.own:
        form = w.one_of("{a} += {b}", "{a}.add_({b})", "{a}.add_({b}, alpha=0.5)", "{a} += {a}", "{a} -= 0.5 * {b}",
                        "{a} = {b} + {a}")  # fmt: skip
        w.write(form.format(a=a, b=b))
    return a


@statement(5)
def add(w):
    a, shape = w.tensor(lambda s: True)
    b, _ = w.tensor(lambda s: s == shape)
    _add(w, a, b, shape)


@statement(2)
def scalar(w):
    a, shape = w.tensor()
    if w.chance(0.5):
        w.new(shape, w.one_of("{a} + 1", "1 + {a}", "{a} * 2", "torch.add({a}, 1.0)", "-{a}", "{a} + {a}", "{a} * {a}",
                              "{a} + {a}.mean()", "{a} + {a}[:1]", "{a} * {a}.sigmoid()",
                              "torch.where({a} > 0, {a}, 0.1 * {a})",
                              "{a}.clamp(-1, 1)", "{a}.clone()", "{a}.contiguous()", "{a}.to({a}.dtype)", "{a}.float()",
                              "torch.cat([{a}, {a}])[: len({a})]").format(a=a))  # fmt: skip
    elif a in w.own:
        w.write(w.one_of("{a} += 1", "{a}.add_(1)", "{a}.mul_(0.5)", "{a} *= 2", "{a}.add_({a}.mean())",
                         "{a}.clamp_(-1, 1)",
                         "{a} += {a}.detach()").format(a=a))  # fmt: skip


@statement(3)
def alias(w):
    """Another name for the same object, or the same memory."""
    a, shape = w.tensor()
    if w.viewing:
        w.new(shape, w.one_of("{}", "{}", "{}", "{}.detach()", "{}.data", "{}.view_as({})", "{}[:]").replace("{}", a))


@statement(3)
def view(w):
    a, shape = w.tensor(lambda s: len(s) > 1)
    if not a or not w.viewing:
        return
    kind, n = w.rng.randrange(6), len(shape)
    if kind == 0:
        w.new((shape[0], math.prod(shape[1:])), f"{a}.flatten(1)")
    elif kind == 1:
        w.new((shape[0], *shape[:0:-1]), f"{a}.permute({', '.join(map(str, [0, *range(n - 1, 0, -1)]))})")
    elif kind == 2 and shape[1] > 4:
        w.new((shape[0], 4, *shape[2:]), f"{a}[:, :4]")
    elif kind == 3 and n == 4:
        w.new((shape[0], shape[1], shape[2] * shape[3]), f"{a}.flatten(2)")
    elif kind == 4 and n > 2:
        w.new(shape[:-1], f"{a}[..., 0]")
    else:
        w.new(shape, f"{a}.reshape({a}.shape)")


@statement(3)
def write(w):
    """Changes of values, past autograd or not."""
    a, _ = w.tensor(change=True)
    if a:
        w.write(w.one_of("{a}[:1].mul_(0.5)", "{a}[:1] = 0.25", "{a}.view(-1)[:2].add_(1)" , "{a}.detach().mul_(0.5)",
                         "{a}.data.add_(0.5)", "{a}.data += 1", "with torch.no_grad():\n    {a}.mul_(0.5)",
                         "with torch.no_grad():\n    log.numpy({a})[:1] *= 0.5", "log.numpy({a})[:1] += 1",
                         "{a}.copy_({a}.flip(0))", "{a}.zero_()", "{a}.requires_grad_(False)",
                         "{a}.detach_()", "torch.relu_({a})").format(a=a))  # fmt: skip


# ---- who looks ----


@statement(4)
def look(w):
    a, _ = w.tensor()
    w.write(w.one_of("log.see({a!r}, {a})", "log.see({a!r}, {a})", "log.look({a!r}, {a})", "log.features.append({a})",
                     "self.kept = {a}", "log.see('kept', self.kept)", "log.text({a})",
                     "log.mark({a!r})").format(a=a))  # fmt: skip


@statement(1)
def use_kept(w):
    """What was stored on the module, in this call or the one before."""
    a, shape = w.tensor()
    w.new(shape, f"{a} + self.kept.detach() if self.kept is not None and self.kept.shape == {a}.shape else {a}")
    w.write(f"self.kept = {w.one_of(a, w.tensors[-1][0])}")


@statement(3)
def gradient_hook(w):
    a, _ = w.tensor()
    w.write(w.one_of("log.hook({a!r}, {a})", "log.hook({a!r}, {a}, 2.0)", "log.retain({a!r}, {a})").format(a=a))


@statement(3)
def function(w):
    a, shape = w.tensor()
    name = w.one_of("Double", "Ignoring", "Same", "Viewing", "Saving", "Dirty")
    if w.viewing and (name != "Dirty" or a in w.own):
        w.new(shape, f"{name}.apply({a})")


@statement(3)
def module_hook(w):
    if not w.modules:
        return
    name, expression, _ = w.rng.choice(w.modules)
    if "Recursive" in expression:
        return
    kind = w.one_of("forward_hook", "forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    what = w.one_of("log.hook_that('reads', {n!r})", "log.hook_that('doubles', {n!r})", "log.hook_that('notes', {n!r})")
    text = what.format(n=name)
    if "backward" in kind:
        text = f"log.hook_that({w.one_of('notes', 'reads')!r}, 'gradient {name}')"
    if w.chance(0.6):
        w.phases["init"].append(f"    self.{name}.register_{kind}({text})")
    else:
        w.script("before", f"model.{name}.register_{kind}({text})")


# ---- contexts: of the statements that follow ----

CONTEXTS = ("torch.no_grad()", "torch.enable_grad()", "torch.inference_mode()", "torch.autocast('cpu', torch.bfloat16)",
            "save_on_cpu()", "compress_saved_tensors(min_size=1)", "log.packing()", "torch.no_grad()",
            "torch.autocast('cpu', enabled=False)", "one_by_one()")  # fmt: skip


@statement(4)
def context(w):
    kind = w.one_of(*CONTEXTS)
    w.write(f"with {kind}:")
    # views of tensors with a history, made in inference mode, want a gradient in torch and cannot get one
    outer, w.viewing = w.viewing, w.viewing and "inference" not in kind
    w.block(w.rng.randint(1, 4))
    w.viewing = outer


@statement(3)
def branch(w):
    """Not in every call."""
    w.write(f"if log.call {w.one_of('==', '!=')} {w.rng.randrange(3)}:")
    tensors = list(w.tensors)
    w.block(w.rng.randint(1, 3))
    w.tensors = tensors


@statement(2)
def checkpointed(w):
    a, shape = w.tensor(_has_features)
    if not a or w.hidden:
        return
    name = f"part{w.names}"
    w.names += 1
    w.write(f"def {name}({a}):")
    tensors, own = w.tensors, w.own
    w.tensors, w.own, w.hidden = [(a, shape)], set(), True
    w.block(w.rng.randint(1, 4))
    result, shape = w.tensors[-1]
    w.write(f"    return {result}")
    w.tensors, w.own, w.hidden = tensors, own, False
    w.new(shape, f"checkpoint({name}, {a}, use_reentrant={w.chance(0.5)})")


@statement(1)
def failure(w):
    w.write(f"if log.call == {w.rng.randrange(3)}:\n    raise Failure")


# ---- the script ----


@statement(2)
def mode(w):
    if w.modules:
        name = w.rng.choice(w.modules)[0]
        w.script("before", w.one_of(f"model.{name}.eval()", f"model.{name}.eval()", f"model.{name}.train()",
                                    "model.eval()",
                                    "model.train()"))  # fmt: skip


@statement(1)
def freeze(w):
    if w.modules:
        name = w.rng.choice(w.modules)[0]
        on = w.chance(0.2)
        w.script("before", f"model.{name}.requires_grad_({on})")


@statement(1)
def exchange(w):
    kinds = [m for m in w.modules if not m[1].startswith(("nn.Sequential", "Recursive"))]
    if kinds:
        name, expression, _ = w.rng.choice(kinds)
        if expression.startswith(("nn.ReLU", "nn.Identity", "nn.Dropout", "norm")) and w.chance(0.4):
            w.script("before", f"model.{name} = nn.{w.one_of('Identity', 'Tanh', 'ReLU')}()")
        else:
            w.script(w.one_of("before", "between"), f"model.{name} = copy.deepcopy(model.{name})")


@statement(1)
def weights(w):
    w.script(w.one_of("before", "before", "between", "after"),
             "with torch.no_grad():\n    for p in model.parameters():\n        p.mul_(1.25)")  # fmt: skip


@statement(1)
def optimizer(w):
    w.script("after", "log.gradients(model)\ntorch.optim.SGD(model.parameters(), 0.001).step()")


@statement(1)
def between(w):
    w.script("between", w.one_of(
        "log.see('features', *log.features)", "log.see('kept', model.kept)", "model(x, log)",
        "ys = [2 * y for y in ys]",
        "with torch.no_grad():\n    model(x, log)", "model.eval()", "ys[0].relu_()", "ys[0] += 1",
        "ys[-1].detach().mul_(2)",
        "ys = [y.detach() for y in ys]", "ys.append(model(ys[0], log)[0])", "del x",
        "copy.deepcopy(model)", "x.data.zero_()", "torch.save([y.detach() for y in ys], io.BytesIO())"))  # fmt: skip
