# SPDX-License-Identifier: Apache-2.0
"""What the tests share. Imports nothing of the package under test."""
