#!/bin/sh
# Takes out of an installed environment what the gateway never reads: slim.sh /opt/fluxgate
set -eu
packages=$(echo "$1"/lib/python3.*/site-packages)
# botocore describes some 400 services; we speak to one. The endpoint rules beside it are shared.
find "$packages/botocore/data" -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts ! -name sso ! -name sso-oidc -exec rm -rf {} +
rm -rf "$packages"/pip "$packages"/pip-*.dist-info "$packages"/setuptools "$packages"/setuptools-*.dist-info "$packages"/pkg_resources "$packages"/_distutils_hack "$packages"/distutils-precedence.pth
find "$packages" -name __pycache__ -type d -prune -exec rm -rf {} +
find "$packages" -name tests -type d -prune -exec rm -rf {} +
# Debug symbols of compiled wheels, where a strip is at hand.
if command -v strip > /dev/null; then find "$packages" -name '*.so*' -type f -exec strip --strip-unneeded {} + 2> /dev/null || true; fi
