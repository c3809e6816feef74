"""The mathematics of a flow policy with Gaussian denoising steps: pure functions of tensors.

Conventions (LeRobot's and openpi's): `t = 1` is noise, `t = 0` is the action, `x_t = t * noise + (1 - t) * action`
and the velocity is `v = noise - action`. K denoising steps go from `t_0 = 1` to `t_K = 0`.
"""
