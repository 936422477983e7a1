# SPDX-License-Identifier: Apache-2.0
"""What Kandinsky 3 costs on a TPU slice, found out on a machine without one."""
