#!/usr/bin/env bash
# Installs what the clients in other languages need: Node.js packages from npm, and Ruby with gRPC from Debian's packages.
# What can't be installed here is said loudly; the tests of that language are then skipped, and say so again.
set -u
cd "$(dirname "$0")" || exit 1

loud() { printf '\n!!! interop: %s\n!!! the tests of that client will be SKIPPED on this machine\n\n' "$*" >&2; }

if ! command -v npm >/dev/null; then
  loud "npm is missing; install Node.js 18 or newer"
elif ! cmp -s node/package-lock.json node/node_modules/.installed-lock; then
  echo "interop: installing the Node.js client's packages"
  if (cd node && npm ci --no-progress --loglevel=error); then
    cp node/package-lock.json node/node_modules/.installed-lock
  else
    loud "npm could not install @grpc/grpc-js"
  fi
fi

if ! command -v grpc_tools_ruby_protoc >/dev/null || ! ruby -e 'require "grpc"' 2>/dev/null; then
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "interop: installing Ruby's gRPC from the distribution's packages"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq ruby-grpc ruby-grpc-tools; } \
      >/dev/null 2>&1 || loud "apt-get could not install ruby-grpc and ruby-grpc-tools"
  else
    loud "Ruby's gRPC is missing; install the packages ruby-grpc and ruby-grpc-tools"
  fi
fi
exit 0
