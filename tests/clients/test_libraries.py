"""The tests that the Go and the Ruby library bring along, against a real daemon; and how their files look."""

import os

from programs import ready, run


def test_go(daemon):
    ready("go")
    out = run("scripts/go-client", "test", "-count=1", "-v", "lamina.dev/lamina", env={**os.environ, "LAMINA_TARGET": daemon.target})
    assert "SKIP" not in out and "PASS" in out, out


def test_go_sources_are_formatted_and_vetted():
    ready("go")
    assert run("gofmt", "-l", "client/go/lamina", "client/go/train") == ""
    run("scripts/go-client", "vet", "lamina.dev/lamina", "lamina.dev/train")


def test_ruby(daemon):
    ready("ruby")
    out = run("ruby", "-w", "client/ruby/test/lamina_test.rb", env={**os.environ, "LAMINA_TARGET": daemon.target})
    assert " 0 skips" in out and " 0 runs" not in out, out
    assert "client/ruby/lib/lamina.rb:" not in out and "client/ruby/lib/lamina/session" not in out, out  # warnings
