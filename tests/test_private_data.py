"""pytest tests/test_private_data.py"""

import re

import pytest

from support.private_data import replace_private

LETTERS = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7" * 5
HEX = "0a1b2c3d4e5f6789" * 4
IPV6 = "2a00:1450:4001:82f::200e"


@pytest.mark.parametrize("text", [
    "kim@firma.co.kr", "a@b.co", "o'neil <x@y.museum>", "jörg@müller.de", "ME@WORK.COM and",
    "a+tag@sub.x-y.technology", "me@xn--bcher-kva.xn--p1ai", "kim@163.com", "(me@work.pizza)",
    "mail: me@work.org.", "mailto:me@work.ai", "http://h.de/?mail=me@work.org"])
def test_addresses_of_any_domain(text):
    address = re.search(r"[\w+]+@[\w.-]*\w", text)[0]
    assert replace_private(text) == text.replace(address, "user@example.com")


@pytest.mark.parametrize("text,replaced", [
    ("postgres://kim:s3cr3t@db.firma.de/x", "postgres://kim:KEY@db.firma.de/x"),
    ("redis://:p%40ss@10.0.0.7:6379", "redis://:KEY@10.0.0.7:6379"),
    ("https://kim:ghx@[2001:db8::1]/", "https://kim:KEY@[2001:db8::1]/"),
    ("http://u:a:b@host amqps://u:p@ss@host", "http://u:KEY@host amqps://u:KEY@host"),
    # escapes in source code are not part of a word
    (r'"Mail:\nme@work.org"', r'"Mail:\nuser@example.com"'),
    (r"Doe\\jane@uni.edu", r"Doe\\user@example.com"), (r"CORP\kim@a.com", r"CORP\user@example.com"),
    (r'"\t93.184.216.34"', r'"\t192.0.2.1"'), (r'"\nsk-' + "a" * 40 + '"', r'"\nKEY"'),
    # addresses of computers
    (f"http://[{IPV6}]:80/", "http://[2001:db8::1]:80/"), (f"{IPV6}/64", "2001:db8::1/64"),
    (IPV6.upper(), "2001:db8::1"), (f"{IPV6}%et", "2001:db8::1%et"),
    ("2001:470:1f0b:1:2:3:4:5", "2001:db8::1"), ("2a00:1450:4001::93.184.216.34", "2001:db8::1"),
    ("::ffff:93.184.216.34", "::ffff:192.0.2.1"), ("a 2a00:1450::1:0: b", "a 2001:db8::1: b"),
    ("93.184.216.34-93.184.216.40", "192.0.2.1-192.0.2.1"), ("at 93.184.216.34:80.", None),
    ("host = 93.184.216.34", None), ("version 2.1 at 93.184.216.34", None),
    ("verify 93.184.216.34", None), ("release_host = 93.184.216.34", None),
    ("-----BEGIN RSA PRIVATE KEY-----\n" + "a1b2" * 16 + "\n-----END RSA PRIVATE KEY-----", "KEY")])
def test_private_data_is_replaced(text, replaced):
    replaced = replaced or text.replace("93.184.216.34", "192.0.2.1")
    assert replace_private(text) == replaced == replace_private(replaced)


@pytest.mark.parametrize("key", [
    "github_pat_" + LETTERS[:22] + "_" + LETTERS[:59], "ghp_" + LETTERS[:36],
    "glpat-" + LETTERS[:20], "xoxb-123456789012-123456789012-" + LETTERS[:24],
    "https://hooks.slack.com/services/T0123ABCD/B0123ABCD/" + LETTERS[:24],
    "sk_live_" + LETTERS[:24], "sk-" + LETTERS[:48], "sk-" + HEX[:32],
    "sk-proj-" + LETTERS[:20] + "_-" + LETTERS[:40], "sk-ant-api03-" + LETTERS[:93] + "-AA",
    "hf_" + LETTERS[:34], "AKIA" + "ABCDEFGHIJKLMNOP", "AIza" + LETTERS[:35], "npm_" + LETTERS[:36],
    "pypi-AgEI" + LETTERS[:80], "SG." + LETTERS[:22] + "." + LETTERS[:43], "SK" + HEX[:32],
    "123456789:AA" + LETTERS[:33], f"eyJ{LETTERS[:20]}.eyJ{LETTERS[:30]}.{LETTERS[:43]}",
    "dop_v1_" + HEX, "hvs." + LETTERS[:24]])
def test_keys_of_every_kind(key):
    fake = "https://KEY" if key.startswith("https") else "KEY"
    for text in ("{}", "key = '{}'", "KEY={}\n", '"\\n{}"', "Bearer {}, "):
        assert replace_private(text.format(key)) == text.format(fake)
    assert replace_private("x" + key) == "x" + key or key.startswith(("https", "1"))


@pytest.mark.parametrize("text", [
    "AWS_SECRET_ACCESS_KEY={}\n", 'aws_secret_access_key = "{}"', '"aws_secret_access_key": "{}"'])
def test_secret_keys_recognized_by_their_name(text):
    assert replace_private(text.format((LETTERS + "/+")[-40:])) == text.format("KEY")


@pytest.mark.parametrize("text", [
    # no e-mail addresses
    "icon@2x.png", "logo@large.svg", "left-pad@1.2.3", "lib@1.2.3.tgz", "react@^18.2.0",
    "user@host", "@app.route('/')", "x = q@k.transpose(1)", "x = a@b.weight",
    "y = x@self.scale.real", "return a@b.inv@c.imag", "git clone git@github.com:o/r.git",
    "ssh://me@host.org/x", "s@foo@bar.baz@", "this@MainActivity.field", "getty@tty1.service",
    "https://unpkg.com/vue@3.2.1/dist/vue.js", "a @ b.com", "memcpy@GLIBC_2.14",
    "kim@example.org", "kim@mail.example.com", "kim@host.test",
    # no passwords
    "http://kim:${PASSWORD}@host.de", "http://{user}:{key}@host.de", "http://%s:%s@host.de",
    "http://user:password@host.de", "http://a:b@localhost:80/", "http://host.de:80/@kim",
    # no public IPv6 addresses
    "::1", "fe80::1%eth0", "fd12:3456:789a::1", "2001:db8::8a2e:370:7334", "2001:4860:4860::8888",
    "x[2000::2]", "x[2000:3000:2]", "std::vector<int>", "2023:10:05 12:30:45", "x[2000::]",
    "2c:54:91:88:c9:e3", "a {color: #2a2a2a}", "sha256:2a2a:3b3b", "2000: 3f3f 4a4a",
    # no public IPv4 addresses, but versions and other numbers
    "127.0.0.1 10.0.0.7 8.8.8.8 1.2.3.4.5 999.1.1.1", "version 1.2.3.4",
    'VERSION = "4.12.33.100"', '"version": "4.12.33.100"', "<Version>4.12.33.100</Version>",
    'versions = ["14.12.33.100", "14.12.33.101"]', "pip install x==14.12.33.100",
    "x>=14.12.33.100", "v14.12.33.100", "v 14.12.33.100", "14.12.33.100-beta", "14.12.33.100b",
    "14.12.33.100.7", 'AssemblyVersion("14.12.33.100")', "Chrome/14.12.33.100", "14.12.33.300",
    "tag: 14.12.33.100", "The version number is 14.12.33.100", "x-14.12.33.100.tar.gz",
    "10.2.4\t16.8.172.17\t1.47.0", "__version__ = '14.12.33.100'", 'Identifier("2.5.29.17")',
    # no keys
    "sk-toggleable-content-with-a-long-name", "task-0123456789abcdef0123456789abcdef",
    "hf_hub_download", "npm_config_registry", "SK1234", "eyJ.eyJ.", "AKIA", "sk_live_", "xoxb-",
    'b"-----BEGIN OPENSSH PRIVATE KEY-----"\nb"-----END OPENSSH PRIVATE KEY-----"'])
def test_text_that_only_looks_private(text):
    assert replace_private(text) == text
