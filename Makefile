# SPDX-License-Identifier: BSD-2-Clause-Patent
# For people. What is built and how is in meson.build.

all: build/build.ninja
	ninja -C build

build/build.ninja:
	meson setup build

deps:
	scripts/deps

check: deps all
	scripts/check

# Fuzzing for longer, and everything else that does not fit into an hour.
check-long: deps all
	scripts/check --long

demo:
	scripts/deps build guests
	[ -f build/build.ninja ] || meson setup build
	ninja -C build latent latent-qemu.so
	demo/run

bench: deps all
	bench/run --all

# Without the assertions that tests run with: nothing that fails may take a guest with it.
install: all
	[ -f build/install/build.ninja ] || meson setup build/install --buildtype=release
	ninja -C build/install install

clean:
	rm -rf build

help:
	@echo "make        builds"
	@echo "make deps   installs the Debian packages that are needed (root or sudo)"
	@echo "make demo   shows three guests that share one image; sets everything up by itself"
	@echo "make check  runs all tests; sets everything up by itself"
	@echo "make bench  measures; the report is build/bench/report.md"

# deps before all, whatever -j says.
.NOTPARALLEL:

.PHONY: all deps check check-long demo bench install clean help
