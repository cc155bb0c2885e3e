"""Update rules. Each one is declared once, here: its numbers, its coefficients, and two functions.

`numbers` names the hyperparameters that the optimizer's class hands over, besides those that all rules have.
`prepare(lr, step, numbers)` turns them into `coefficients`, in float64, so that the update takes no powers.
`update(g, state0, state1, state2, coefficients)` takes the gradient and the states in float32 (None for a state that
does not exist) and returns by how much the parameter falls, and the three new states. Triton before 3.7 cannot return
None among other results: what is returned in place of a state that does not exist is not stored.

`llmfast/optim/` has the same rules in plain torch.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rule(NamedTuple):
    """An update rule, for the kernels to call."""

    numbers: tuple[str, ...]
    coefficients: tuple[str, ...]
    prepare: Any  # @triton.jit functions
    update: Any

    @classmethod
    def of(cls, numbers: Any, coefficients: Any, prepare: Any, update: Any) -> "Rule":
        """Take the names from the classes that the functions use."""
        return cls(numbers=numbers._fields, coefficients=coefficients._fields, prepare=prepare, update=update)


@triton.jit
def power(x, n):
    """Return x**n for x in [0, 1); 0 stays 0 for every n."""
    return tl.where(x > 0.0, tl.exp2(n * tl.log2(tl.where(x > 0.0, x, 1.0))), 0.0)


class AdamNumbers(NamedTuple):
    """Hyperparameters of Adam."""

    beta1: Any
    beta2: Any
    eps: Any


class AdamCoefficients(NamedTuple):
    """Coefficients of Adam."""

    beta1: Any
    rate1: Any
    beta2: Any
    rate2: Any
    step_size: Any
    root2: Any
    eps: Any


@triton.jit
def prepare_adam(lr, step, numbers):
    """Fold both bias corrections into the coefficients."""
    n = AdamNumbers(*numbers)
    return AdamCoefficients(
        beta1=n.beta1,
        rate1=1.0 - n.beta1,
        beta2=n.beta2,
        rate2=1.0 - n.beta2,
        # float32 as early as possible: 64-bit numbers fill the registers.
        step_size=(lr / (1.0 - power(n.beta1, step))).to(tl.float32),
        root2=(1.0 / tl.sqrt(1.0 - power(n.beta2, step))).to(tl.float32),
        eps=n.eps,
    )


@triton.jit
def adam(g, m, v, vmax, coefficients):
    """Compute Adam (Kingma & Ba 2015) with torch's placement of eps; with `vmax`, AMSGrad (Reddi et al. 2018)."""
    c = AdamCoefficients(*coefficients)
    m = c.beta1 * m + c.rate1 * g  # not m + rate1 * (g - m), which loses a small g next to a large m
    v = c.beta2 * v + c.rate2 * g * g
    second = v
    if vmax is not None:
        second = tl.maximum(v, vmax, propagate_nan=tl.PropagateNan.ALL)
    return c.step_size * tl.div_rn(m, tl.sqrt_rn(second) * c.root2 + c.eps), m, v, second


class SGDNumbers(NamedTuple):
    """Hyperparameters of gradient descent."""

    momentum: Any
    dampening: Any
    nesterov: Any  # 0 or 1


class SGDCoefficients(NamedTuple):
    """Coefficients of gradient descent: the change is own * g + carried * buffer."""

    momentum: Any
    rate: Any
    own: Any
    carried: Any
    lr: Any


@triton.jit
def prepare_sgd(lr, step, numbers):
    """Leave the first gradient undamped, as torch does."""
    n = SGDNumbers(*numbers)
    return SGDCoefficients(
        momentum=n.momentum,
        rate=tl.where(step > 1.0, 1.0 - n.dampening, 1.0),
        own=n.nesterov,
        carried=tl.where(n.nesterov != 0.0, n.momentum, 1.0),
        lr=lr,
    )


@triton.jit
def sgd(g, buffer, none1, none2, coefficients):
    """Compute gradient descent, with momentum if there is a buffer (Sutskever et al. 2013 for Nesterov's)."""
    c = SGDCoefficients(*coefficients)
    change = g
    new = g
    if buffer is not None:
        new = c.momentum * buffer + c.rate * g
        change = c.own * g + c.carried * new
    return c.lr * change, new, g, g


class RMSpropNumbers(NamedTuple):
    """Hyperparameters of RMSProp."""

    alpha: Any
    momentum: Any
    eps: Any


class RMSpropCoefficients(NamedTuple):
    """Coefficients of RMSProp."""

    alpha: Any
    rate: Any
    momentum: Any
    lr: Any
    eps: Any


@triton.jit
def prepare_rmsprop(lr, step, numbers):
    """Pass the hyperparameters on."""
    n = RMSpropNumbers(*numbers)
    return RMSpropCoefficients(alpha=n.alpha, rate=1.0 - n.alpha, momentum=n.momentum, lr=lr, eps=n.eps)


@triton.jit
def rmsprop(g, square, buffer, mean, coefficients):
    """Compute RMSProp (Hinton 2012), centered if there is a `mean` (Graves 2013), with momentum if a `buffer`."""
    c = RMSpropCoefficients(*coefficients)
    square = c.alpha * square + c.rate * g * g
    variance = square
    new_mean = g
    if mean is not None:
        new_mean = c.alpha * mean + c.rate * g
        # Rounding must not make it negative.
        variance = tl.maximum(square - new_mean * new_mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    change = tl.div_rn(g, tl.sqrt_rn(variance) + c.eps)
    if buffer is not None:
        change = c.momentum * buffer + change
    return c.lr * change, square, change, new_mean


class AdagradNumbers(NamedTuple):
    """Hyperparameters of AdaGrad."""

    lr_decay: Any
    eps: Any


class AdagradCoefficients(NamedTuple):
    """Coefficients of AdaGrad."""

    lr: Any
    eps: Any


@triton.jit
def prepare_adagrad(lr, step, numbers):
    """Let the learning rate decay with the step."""
    n = AdagradNumbers(*numbers)
    return AdagradCoefficients(lr=lr / (1.0 + (step - 1.0) * n.lr_decay), eps=n.eps)


@triton.jit
def adagrad(g, total, none1, none2, coefficients):
    """Compute AdaGrad (Duchi et al. 2011)."""
    c = AdagradCoefficients(*coefficients)
    total += g * g
    return c.lr * tl.div_rn(g, tl.sqrt_rn(total) + c.eps), total, g, g


class LionNumbers(NamedTuple):
    """Hyperparameters of Lion."""

    beta1: Any
    beta2: Any


class LionCoefficients(NamedTuple):
    """Coefficients of Lion."""

    beta1: Any
    rate1: Any
    beta2: Any
    rate2: Any
    lr: Any


@triton.jit
def prepare_lion(lr, step, numbers):
    """Pass the hyperparameters on."""
    n = LionNumbers(*numbers)
    return LionCoefficients(beta1=n.beta1, rate1=1.0 - n.beta1, beta2=n.beta2, rate2=1.0 - n.beta2, lr=lr)


@triton.jit
def lion(g, m, none1, none2, coefficients):
    """Compute Lion (Chen et al. 2023): the sign of an average in which the newest gradient has a weight of its own."""
    c = LionCoefficients(*coefficients)
    direction = c.beta1 * m + c.rate1 * g
    sign = tl.where(direction > 0.0, 1.0, tl.where(direction < 0.0, -1.0, direction))  # of NaN it is NaN
    return c.lr * sign, c.beta2 * m + c.rate2 * g, g, g


RULES = {
    "adam": Rule.of(AdamNumbers, AdamCoefficients, prepare=prepare_adam, update=adam),
    "sgd": Rule.of(SGDNumbers, SGDCoefficients, prepare=prepare_sgd, update=sgd),
    "rmsprop": Rule.of(RMSpropNumbers, RMSpropCoefficients, prepare=prepare_rmsprop, update=rmsprop),
    "adagrad": Rule.of(AdagradNumbers, AdagradCoefficients, prepare=prepare_adagrad, update=adagrad),
    "lion": Rule.of(LionNumbers, LionCoefficients, prepare=prepare_lion, update=lion),
}
