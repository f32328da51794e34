"""Haiku forward functions, images → logits, for `hk.transform_with_state`.

Every model takes images [B, H, W, C] in [0, 1], whatever their size. The convolutional ones draw weights from a normal
distribution of variance 2/fan-in, truncated at two standard deviations of its own (He et al. 2015, arXiv:1502.01852), those of
the output layer with variance 0.1/fan-in: the logits begin small and the loss near log(classes). No weight begins at 0, which is
a critical point of powerpropagation.
"""
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import ml_collections

from experiments import convolution
from powerprop.reparam import Where, is_weight


class Model(NamedTuple):
  forward: Callable[[jax.Array, bool], jax.Array]   # (images [B, H, W, C] in [0, 1], is_training) → logits [B, classes]
  output_layer: str                                  # name of the output layer's weights
  first_layer: str                                   # name of the first layer's weights; in sorted trees it need not be first
  batch_norm: bool = False                           # whether it has running statistics; then is_training makes a difference


# ---- layers -----------------------------------------------------------------------------------------------------

# Mean and standard deviation by channel over all pixels of the 50,000 training images of CIFAR-10, in [0, 1].
CIFAR_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR_STDDEV = (0.24703223, 0.24348513, 0.26158784)

HE = hk.initializers.VarianceScaling(2.0, 'fan_in', 'truncated_normal')
SMALL = hk.initializers.VarianceScaling(0.1, 'fan_in', 'truncated_normal')


# The same over the pixels of ImageNet, as all who train on it have them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STDDEV = (0.229, 0.224, 0.225)


def normalise(images: jax.Array, mean: Sequence[float] = CIFAR_MEAN, stddev: Sequence[float] = CIFAR_STDDEV) -> jax.Array:
  """Colour images [B, H, W, 3] in [0, 1] → mean 0 and variance 1 over CIFAR-10, by channel; others as they are."""
  if images.shape[-1] != len(mean):
    return images
  by_channel = [jnp.array(x, images.dtype).reshape(1, 1, 1, -1) for x in (mean, stddev)]
  return (images - by_channel[0]) / by_channel[1]


def max_pool(x: jax.Array) -> jax.Array:
  """Largest of each 2×2 pixels: [B, H, W, C] → [B, ⌊H/2⌋, ⌊W/2⌋, C]. A maximum over axes: its gradient, unlike that of a
  window, is fast on CPUs; equals share it."""
  b, h, w, c = x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3]
  return x[:, :2 * h, :2 * w].reshape(b, h, 2, w, 2, c).max((2, 4))


def _bias(stddev: float) -> Any:
  return hk.initializers.TruncatedNormal(stddev) if stddev else jnp.zeros


def _conv(x: jax.Array, channels: int, stride: int, name: str, size: int = 3) -> jax.Array:
  """Convolution without bias, for a BatchNorm to follow."""
  return hk.Conv2D(channels, size, stride, with_bias=False, w_init=HE, name=name)(x)


def _norm(x: jax.Array, is_training: bool, name: str) -> jax.Array:
  """BatchNorm with scale and offset, statistics averaged with decay 0.9 and bias correction (the first update counts fully).

  Before any update the averages are 0, so a network that has seen nothing can be evaluated only with is_training.
  """
  return hk.BatchNorm(True, True, 0.9, name=name)(x, is_training)


def _logits(x: jax.Array, classes: int, bias_stddev: float) -> jax.Array:
  return hk.Linear(classes, w_init=SMALL, b_init=_bias(bias_stddev), name='output')(x)


# ---- networks without BatchNorm ---------------------------------------------------------------------------------


def lenet_300_100(classes: int, bias_stddev: float) -> Model:
  """LeNet-300-100: 784-300-100-`classes` with ReLU for 28×28 images.

  Weights are drawn from a normal distribution with standard deviation 1/sqrt(fan-in), truncated at two of them (Haiku's own
  default); biases likewise with `bias_stddev`, or zero where that is 0.
  Source: LeCun et al. 1998; the initialisation is that of the paper's released notebook.
  """
  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    return hk.nets.MLP([300, 100, classes], b_init=_bias(bias_stddev))(hk.Flatten()(images))

  return Model(forward, 'mlp/~/linear_2/w', 'mlp/~/linear_0/w')


def mlp(widths: Sequence[int], classes: int, bias_stddev: float) -> Model:
  """Dense layers of these widths with ReLU and one to the classes; weights and biases as in `lenet_300_100`."""
  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    return hk.nets.MLP([*widths, classes], b_init=_bias(bias_stddev))(hk.Flatten()(normalise(images)))

  return Model(forward, f'mlp/~/linear_{len(widths)}/w', 'mlp/~/linear_0/w')


def lenet_5(classes: int, bias_stddev: float) -> Model:
  """LeNet-5 as pruning papers have it, which is Caffe's: 5×5 convolutions of 20 and 50 channels without padding, each followed
  by a 2×2 max-pool, 500 units with ReLU (the only one), `classes`; 431,080 parameters for 28×28 grey images and ten classes.

  Source: Caffe, examples/mnist; used so by Han et al. 2015 (arXiv:1506.02626) and SNIP (Lee et al. 2019, arXiv:1810.02340).
  """
  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    layer = functools.partial(hk.Conv2D, kernel_shape=5, padding='VALID', w_init=HE, b_init=_bias(bias_stddev))
    x = max_pool(layer(20, name='conv_0')(normalise(images)))
    x = max_pool(layer(50, name='conv_1')(x))
    x = jax.nn.relu(hk.Linear(500, w_init=HE, b_init=_bias(bias_stddev), name='dense')(hk.Flatten()(x)))
    return _logits(x, classes, bias_stddev)

  return Model(forward, 'output/w', 'conv_0/w')


def conv_net(widths: Sequence[int], classes: int, bias_stddev: float) -> Model:
  """3×3 convolutions of these widths with ReLU, all but the first with stride 2, and one dense layer: small enough for a CPU."""
  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    x = normalise(images)
    for i, width in enumerate(widths):
      layer = hk.Conv2D(width, 3, 1 if i == 0 else 2, w_init=HE, b_init=_bias(bias_stddev), name=f'conv_{i}')
      x = jax.nn.relu(layer(x))
    return _logits(hk.Flatten()(x), classes, bias_stddev)

  return Model(forward, 'output/w', 'conv_0/w')


def alexnet_small(classes: int, bias_stddev: float) -> Model:
  """AlexNet reduced for 32×32 images, SNIP's AlexNet-s: five convolutions (11×11, 5×5 and three 3×3; 96, 256, 384, 384 and 256
  channels), all with stride 2, two dense layers of 1024 units, ReLU; 5,070,218 parameters for ten classes.

  Differs from SNIP's: no BatchNorm, as in the original AlexNet, so that one-shot pruning leaves no stale statistics behind.
  Source: Lee et al. 2019 (arXiv:1810.02340) and their code, github.com/namhoonlee/snip-public, snip/network.py.
  """
  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    x = normalise(images)
    for i, (size, width) in enumerate(((11, 96), (5, 256), (3, 384), (3, 384), (3, 256))):
      x = jax.nn.relu(hk.Conv2D(width, size, 2, w_init=HE, b_init=_bias(bias_stddev), name=f'conv_{i}')(x))
    x = hk.Flatten()(x)
    for i in range(2):
      x = jax.nn.relu(hk.Linear(1024, w_init=HE, b_init=_bias(bias_stddev), name=f'dense_{i}')(x))
    return _logits(x, classes, bias_stddev)

  return Model(forward, 'output/w', 'conv_0/w')


# ---- residual networks ------------------------------------------------------------------------------------------


def resnet(widths: Sequence[int], blocks: int, project: bool, classes: int, bias_stddev: float) -> Model:
  """Residual network for small images: a 3×3 convolution, then for each width a stage of `blocks` blocks of two 3×3 convolutions,
  every stage but the first halving the image, then the mean over pixels and a dense layer. BatchNorm after each convolution.

  Args:
    widths: channels of each stage; the first convolution has those of the first.
    project: where a block changes the shape, its shortcut is a 1×1 convolution with BatchNorm (option B); or else it takes every
      second pixel and fills up the channels with zeros, without parameters (option A).
  Source: He et al. 2016 (arXiv:1512.03385). resnet_20 is that of section 4.2, with option A as there; resnet_18 that of table 1
    with the first convolution 3×3, stride 1 and no max-pool, as is usual for 32×32 images.
  """
  def shortcut(x: jax.Array, width: int, stride: int, is_training: bool) -> jax.Array:
    if x.shape[-1] == width and stride == 1:
      return x
    if project:
      return _norm(_conv(x, width, stride, 'shortcut', 1), is_training, 'norm_shortcut')
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))

  def block(x: jax.Array, width: int, stride: int, is_training: bool) -> jax.Array:
    y = jax.nn.relu(_norm(_conv(x, width, stride, 'conv_0'), is_training, 'norm_0'))
    y = _norm(_conv(y, width, 1, 'conv_1'), is_training, 'norm_1')
    return jax.nn.relu(y + shortcut(x, width, stride, is_training))

  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    x = jax.nn.relu(_norm(_conv(normalise(images), widths[0], 1, 'stem'), is_training, 'norm_stem'))
    x = _stages(block, x, widths, blocks, is_training)
    return _logits(x.mean((1, 2)), classes, bias_stddev)

  return Model(forward, 'output/w', 'stem/w', batch_norm=True)


def wide_resnet(depth: int, factor: int, classes: int, bias_stddev: float) -> Model:
  """WRN-`depth`-`factor`: three stages of (depth − 4)/6 blocks, 16, 32 and 64 times `factor` channels wide, BatchNorm and ReLU
  before each convolution, no dropout; a 1×1 convolution as shortcut where a block changes the shape.

  Source: Zagoruyko and Komodakis 2016 (arXiv:1605.07146). RigL and SNFS use WRN-22-2 for CIFAR-10.
  """
  def block(x: jax.Array, width: int, stride: int, is_training: bool) -> jax.Array:
    y = jax.nn.relu(_norm(x, is_training, 'norm_0'))
    shortcut = x if x.shape[-1] == width and stride == 1 else _conv(y, width, stride, 'shortcut', 1)
    y = jax.nn.relu(_norm(_conv(y, width, stride, 'conv_0'), is_training, 'norm_1'))
    return shortcut + _conv(y, width, 1, 'conv_1')

  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    x = _conv(normalise(images), 16, 1, 'stem')
    x = _stages(block, x, [factor * width for width in (16, 32, 64)], (depth - 4) // 6, is_training)
    x = jax.nn.relu(_norm(x, is_training, 'norm_output'))
    return _logits(x.mean((1, 2)), classes, bias_stddev)

  return Model(forward, 'output/w', 'stem/w', batch_norm=True)


def resnet_50(width: float, classes: int, bias_stddev: float) -> Model:
  """ResNet-50 v1.5 for photographs, 25.6 million parameters at width 1: Haiku's, whose blocks halve the image in their 3×3
  convolution and begin as the identity, since the last BatchNorm's scale is 0.

  Differs from Haiku's: the weights of the dense layer are drawn with standard deviation 0.01 (Goyal et al. 2017,
  arXiv:1706.02677, section 5.1) and do not begin at 0, which is a critical point of powerpropagation.

  Args:
    width: channels of every layer, in those of ResNet-50.
  """
  def forward(images: jax.Array, is_training: bool) -> jax.Array:
    channels = [round(width * c) for c in (256, 512, 1024, 2048)]
    net = hk.nets.ResNet((3, 4, 6, 3), classes, channels_per_group=channels, name='resnet',
                         initial_conv_config={'output_channels': round(width * 64)},
                         logits_config={'w_init': hk.initializers.RandomNormal(0.01), 'b_init': _bias(bias_stddev)})
    return net(normalise(images, IMAGENET_MEAN, IMAGENET_STDDEV), is_training)

  return Model(forward, 'resnet/~/logits/w', 'resnet/~/initial_conv/w', batch_norm=True)


def _stages(block: Callable[..., jax.Array], x: jax.Array, widths: Sequence[int], blocks: int, is_training: bool) -> jax.Array:
  """Stages of blocks named 'stage_i_block_j', every stage but the first halving the image: [B, H, W, C] → [B, H', W', C']."""
  for i, width in enumerate(widths):
    for j in range(blocks):
      with hk.name_scope(f'stage_{i}_block_{j}'):
        x = block(x, width, 2 if i > 0 and j == 0 else 1, is_training)
  return x


# ---- what there is ----------------------------------------------------------------------------------------------


def is_weight_or_bias(name: str, leaf: Any) -> bool:
  return is_weight(name, leaf) or name.endswith('/b')


MODELS: dict[str, Callable[[int, float], Model]] = {
    'lenet_300_100': lenet_300_100,
    'mlp_100_100': functools.partial(mlp, (100, 100)),
    'mlp_500_500': functools.partial(mlp, (500, 500)),
    'mlp_2000_2000': functools.partial(mlp, (2000, 2000)),
    'lenet_5': lenet_5,
    'conv_16_32_64': functools.partial(conv_net, (16, 32, 64)),
    'conv_32_64_128': functools.partial(conv_net, (32, 64, 128)),
    'alexnet_small': alexnet_small,
    'resnet_20': functools.partial(resnet, (16, 32, 64), 3, False),
    'resnet_18': functools.partial(resnet, (64, 128, 256, 512), 2, True),
    'wide_resnet_22_2': functools.partial(wide_resnet, 22, 2),
    'wide_resnet_16_8': functools.partial(wide_resnet, 16, 8),
    'resnet_50': functools.partial(resnet_50, 1.0),
    'resnet_50_eighth': functools.partial(resnet_50, 1 / 8),
}

# What α acts on, next to the weights.
BIASES: dict[str, Where] = {
    'plain': is_weight,
    'reparameterised': is_weight_or_bias,
}

COMPUTE = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def build(config: ml_collections.ConfigDict, outputs: int, own: bool = True) -> tuple[Model, hk.TransformedWithState]:
  """The model that a config names, and its network in the precision that it names.

  `own`: on CPUs, convolutions by convolution.conv. Not where devices share out a batch: its gradients are sums over a few images
  at a time, and each of them would be exchanged.
  """
  model = MODELS[config.model](outputs, config.bias_stddev)
  forward = in_precision(model.forward, COMPUTE[config.compute])

  def wrapped(images: jax.Array, is_training: bool) -> jax.Array:
    with hk.intercept_methods(convolution.on_cpus):
      return forward(images, is_training)
  return model, hk.transform_with_state(wrapped if own else forward)


def in_precision(forward: Callable[..., jax.Array], compute: Any) -> Callable[..., jax.Array]:
  """The network with its convolutions in `compute`, and activations between layers; BatchNorm's statistics, linear layers, whose
  share of the products is small, with the logits, and all parameters stay float32."""
  if compute == jnp.float32:
    return forward
  layers: dict[type[hk.Module], tuple[Any, Any]] = {
      hk.Conv2D: (compute, compute), hk.Linear: (jnp.float32, jnp.float32), hk.BatchNorm: (jnp.float32, compute)}

  def wrapped(images: jax.Array, is_training: bool) -> jax.Array:
    with contextlib.ExitStack() as stack:
      for layer, (inside, output) in layers.items():
        stack.enter_context(hk.mixed_precision.push_policy(layer, jmp.Policy(jnp.float32, inside, output)))
      return forward(images, is_training)
  return wrapped
