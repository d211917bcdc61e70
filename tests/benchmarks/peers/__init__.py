"""The engines that a user might pick instead, each in an environment of its own: what to install, and the sweep over all of them."""
