# Thin: each target is one or two commands that can be run by hand.
GO      ?= go
PREFIX  ?= /usr/local
DESTDIR ?=
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null)
LDFLAGS  = -s -w $(if $(VERSION),-X main.version=$(VERSION))
GOFLAGS_STATIC = -trimpath -ldflags '$(LDFLAGS)'

export CGO_ENABLED = 0

.DEFAULT_GOAL := help

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build bin/kcradle and the machine package build/pkg-default
	$(GO) build $(GOFLAGS_STATIC) -o bin/kcradle ./cmd/kcradle
	$(GO) build -tags nethttpomithttp2 -trimpath -buildvcs=false -ldflags '-s -w -buildid=' -o build/init ./cmd/init
	bin/kcradle package --kernel kernel --init build/init build/pkg-default
	bin/kcradle docs build/docs

demo: ## show the road on this machine, from nothing to a docker prompt in a pod
	hack/demo

test: build ## install what the tests need, and run all of them
	hack/deps test
	$(GO) vet ./...
	$(GO) test -p 1 -timeout 60m ./...

bench: build ## measure against bare QEMU and against docker
	hack/deps test
	$(GO) run ./hack/bench

soak: build ## many starts and stops: pods per second, memory of idle pods, what a thousand starts leave behind
	hack/deps test
	for kind in rate idle soak exec; do $(GO) run ./hack/load $$kind || exit 1; done

moby: build ## moby's own integration tests against kcradle's daemon: those of the kept list must pass
	hack/deps test
	$(GO) run ./hack/moby-suite -daemon bin/kcradle -check

kernel: ## build the guest kernel from Debian's source again, to the same bytes
	kernel/build.sh kernel

lint: ## gofmt, vet
	@test -z "$$(gofmt -l .)" || { gofmt -l . && echo "these files want gofmt -w" && false; }
	$(GO) vet ./...

install: build ## install below PREFIX (/usr/local)
	install -D -m 755 bin/kcradle $(DESTDIR)$(PREFIX)/bin/kcradle
	install -d $(DESTDIR)$(PREFIX)/lib/kcradle/pkg-default
	install -m 644 build/pkg-default/* $(DESTDIR)$(PREFIX)/lib/kcradle/pkg-default
	install -d $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 644 build/docs/man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1
	install -D -m 644 build/docs/completions/kcradle.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/kcradle
	install -D -m 644 build/docs/completions/_kcradle $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_kcradle
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's,@PREFIX@,$(PREFIX),' packaging/systemd/kcradle.service > $(DESTDIR)$(PREFIX)/lib/systemd/system/kcradle.service
	install -m 644 packaging/systemd/kcradle.socket $(DESTDIR)$(PREFIX)/lib/systemd/system
	install -D -m 644 build/docs/completions/kcradle.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/kcradle.fish

.PHONY: help build demo test bench soak moby kernel lint install
