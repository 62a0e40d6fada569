"""Forks processes and isolates them: the layers of the sandbox.

A Supervisor is started as a bare Python process. It forks processes on request and ends them in
time. It never sees a program or a test, so no process that it forks inherits one. What each layer
stops is in docs/sandbox.md.

Read first: Supervisor.isolate, CALLS, CONDITIONS, seccomp_filter, enter_mounts.
"""

import atexit
import builtins
import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import platform
import resource
import socket
import struct
import sys
import threading
import time
import types
from pathlib import Path

from support.values import receive, send

MEMORY_BYTES = 1 << 30      # of address space for a process
SCRATCH = "/scratch"        # the one folder where a program may write: empty for each program
SCRATCH_BYTES = 16 << 20
MOST_FILES = 64             # that a process may have open
COMMAND = struct.Struct("<cid")     # role, id of a process, seconds
ANSWER = struct.Struct("<i")        # the id of a new process, or how one ended
SCRIPT, END = b"s", b"e"            # roles: start a script; end a process

# ------------------------------------------------------------------------------------------------
# The system calls that a program may make (seccomp). All others fail with "no such call": those for
# processes, signals, sockets that lead outside, ...

# name, number on x86-64, number on aarch64 (-: it has none)
CALLS = """
read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62,
mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135,
rt_sigreturn 15 139, pread64 17 67, readv 19 65, writev 20 66, access 21 -, sched_yield 24 124,
mremap 25 216, madvise 28 233, nanosleep 35 101, getpid 39 172, exit 60 93, uname 63 160,
getcwd 79 17, readlink 89 -, gettimeofday 96 169, getrusage 98 165, times 100 153, getuid 102 174,
getgid 104 176, geteuid 107 175, getegid 108 177, sigaltstack 131 132, gettid 186 178, time 201 -,
recvmsg 47 212, getdents64 217 61, clock_getres 229 114, exit_group 231 94, newfstatat 262 79,
pselect6 270 72, ppoll 271 73, set_robust_list 273 99, getrandom 318 278, membarrier 324 283,
statx 332 291, rseq 334 293, open 2 -, openat 257 56, clone 56 220, futex 202 98,
clock_gettime 228 113, clock_nanosleep 230 115, sched_getaffinity 204 123,
alarm 37 -, setitimer 38 103, getitimer 36 102, getrlimit 97 163, setrlimit 160 164,
prlimit64 302 261, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
eventfd2 290 19, socketpair 53 199, sendto 44 206, recvfrom 45 207, getsockname 51 204, ioctl 16 29,
fcntl 72 25
"""
# Calls for writing, allowed where there is a private folder. All other files are read-only there.
WRITING_CALLS = """
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38,
renameat2 316 276, ftruncate 77 46, fsync 74 82, fdatasync 75 83, chdir 80 49, chmod 90 -,
fchmod 91 52, fchmodat 268 53
"""
ALL_BITS, FUTEX_PRIVATE, FIONBIO = (1 << 32) - 1, 128, 0x5421
THREAD_FLAGS, CLONE_DETACHED = 0x3D0F00, 0x400000
F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC = 1, 2, 3, 1030
# Calls that are allowed only if, for each (argument, mask, values), argument & mask is one of the
# values; and the error with which they fail otherwise
CONDITIONS = {
    # A thread of this process, as the C library starts it: no process, no pidfd, no namespace.
    # Joining a thread waits on a futex that others could share; after EAGAIN it tries again.
    "clone": ([(0, ALL_BITS & ~CLONE_DETACHED, [THREAD_FLAGS])], errno.EAGAIN),
    "futex": ([(1, FUTEX_PRIVATE, [FUTEX_PRIVATE])], errno.EAGAIN),
    # Only the clocks, cores and limits of this process.
    "clock_gettime": ([(0, 1 << 31, [0])], errno.EACCES),
    "clock_nanosleep": ([(0, 1 << 31, [0])], errno.EACCES),
    "sched_getaffinity": ([(0, ALL_BITS, [0])], errno.EACCES),
    "prlimit64": ([(0, ALL_BITS, [0])], errno.EACCES),
    # asyncio wakes itself with a pair of connected Unix sockets, which it makes non-blocking.
    "socketpair": ([(0, ALL_BITS, [socket.AF_UNIX]), (1, 0xF, [socket.SOCK_STREAM])],
                   errno.EACCES),
    # Not the standard streams: all processes share their flags, so one could leave a sign.
    "ioctl": ([(0, ALL_BITS, range(3, MOST_FILES)), (1, ALL_BITS, [FIONBIO])], errno.EACCES),
    "fcntl": ([(1, ALL_BITS, [F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC])], errno.EACCES),
}
NOT_FOR_READING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
READ_ONLY_CONDITIONS = {"open": ([(1, NOT_FOR_READING, [0])], errno.EACCES),
                        "openat": ([(2, NOT_FOR_READING, [0])], errno.EACCES)}

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}        # as the kernel numbers them
# Instructions of classic BPF, the offsets of what they read, and the results of a filter
LOAD, AND, JUMP_IF_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def seccomp_filter(machine, writing=False):
    """The BPF program that decides about every system call, packed; None on other machines.

    An instruction is (code, instructions to skip if true, if false, operand).
    """
    if machine not in MACHINES:
        return None
    column = 1 + list(MACHINES).index(machine)
    program = [(LOAD, 0, 0, MACHINE), (JUMP_IF_EQUAL, 1, 0, MACHINES[machine]),
               (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    calls = CALLS.split(",")
    conditions = dict(CONDITIONS)
    if writing:
        calls += WRITING_CALLS.split(",")
    else:
        conditions |= READ_ONLY_CONDITIONS
    for call in calls:
        fields = call.split()
        if fields[column] == "-":
            continue
        checks, refusal = conditions.get(fields[0], ([], errno.ENOSYS))
        rule = [(RETURN, 0, 0, ALLOW)]
        for argument, mask, values in reversed(checks):
            passed = len(rule)
            rule = [(RETURN, 0, 0, ERROR | refusal), *rule]
            for value in values:            # if equal, skip the other values and the refusal
                rule = [(JUMP_IF_EQUAL, len(rule) - passed, 0, value), *rule]
            rule = [(LOAD, 0, 0, ARGUMENTS + 8 * argument), (AND, 0, 0, mask), *rule]
        program += [(JUMP_IF_EQUAL, 0, len(rule), int(fields[column])), *rule]
    program.append((RETURN, 0, 0, ERROR | errno.ENOSYS))
    return b"".join(struct.pack("HBBI", *step) for step in program)


# ------------------------------------------------------------------------------------------------
# The other layers. System calls without a Python function go through the C library.

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_RECURSIVE = 442, 0x8000
READ_ONLY_MOUNT = struct.pack("4Q", 1 | 2 | 4, 0, 0, 0)     # nor setuid, nor devices
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
CAPABILITY_VERSION_3, CAP_SYS_ADMIN = 0x20080522, 1 << 21
NOBODY = 2_000_000_000      # users with this number or a higher one own no files
PRELOADED = """__future__ math cmath string itertools heapq bisect copy statistics typing hashlib
dataclasses enum textwrap unicodedata calendar numbers tempfile""".split()


def cores():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def system(name, *args):
    """Call a function of the C library; OSError if it returns -1."""
    args = [ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args]
    result = getattr(LIBC, name)(*args)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def mount(source, target, options=None, flags=MS_NOSUID | MS_NODEV):
    """Mount a folder or file in a second place or, with options, a new tmpfs."""
    kind = None if options is None else b"tmpfs"
    system("mount", source.encode(), target.encode(), kind, flags, options)


def enter_mounts(readable):
    """Move to an empty, read-only file system that holds what is readable, and SCRATCH.

    Users other than root may do so in a user namespace, if the system lets them.
    """
    user = os.getuid()
    group = os.getgid()
    system("unshare", CLONE_NEWNS | (CLONE_NEWUSER if user else 0))
    if user:
        for file, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"),
                           ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", file).write_text(line)
    mount("", "/", flags=MS_REC | MS_PRIVATE)       # what follows is not seen outside
    mount("tmpfs", "/proc", b"")
    umask = os.umask(0o666)     # parent folders can be passed through, but not listed
    for path in readable:
        target = Path("/proc" + path)
        if Path(path).is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        mount(path, str(target), flags=MS_BIND | MS_REC)
    os.mkdir("/proc" + SCRATCH)
    system("syscall", MOUNT_SETATTR, -100, b"/proc", AT_RECURSIVE, READ_ONLY_MOUNT, 32)
    os.umask(umask)
    os.chroot("/proc")
    os.chdir("/")


def enter_landlock(readable):
    """From now on, files can be opened only for reading and only below the readable paths."""
    version = system("syscall", LANDLOCK_CREATE, None, 0, 1)
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1   # all of that version
    ruleset = system("syscall", LANDLOCK_CREATE, struct.pack("Q", rights), 8, 0)
    for path in readable:
        file = os.open(path, os.O_PATH)
        read = 1 << 2 | (1 << 3 if os.path.isdir(path) else 0)      # a file, and list a folder
        system("syscall", LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", read, file), 0)
        os.close(file)
    system("syscall", LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def leave_root(capabilities):
    """Become a user without files, and without the rights of root except these capabilities."""
    if os.getuid() == 0:
        system("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
        try:
            set_user(NOBODY + os.getpid())      # a different one each time: limits count by user
        except OSError:                         # a container may not map it
            set_user(65534)
    set_capabilities(capabilities)


def set_user(number):
    os.setgroups([])
    os.setresgid(number, number, number)
    os.setresuid(number, number, number)


def set_capabilities(bits):
    system("capset", struct.pack("Ii", CAPABILITY_VERSION_3, 0),
           struct.pack("6I", bits, bits, 0, 0, 0, 0))


def set_limits(**limits):
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)            # macOS lacks some
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


# ------------------------------------------------------------------------------------------------


def script():
    """Run a program as a script. The program itself comes first on its standard input."""
    program = receive(0)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
    except SystemExit as end:
        if end.code:
            raise
    finally:                                                    # what Python does at its end
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.__stdout__):
            with contextlib.suppress(AttributeError, ValueError):       # None, or closed
                stream.flush()


class Supervisor:
    """The process behind a Sandbox.

    roles: role -> the function that a new process runs, with the descriptors that come with the
    command. number: chooses the core.
    """

    def __init__(self, roles, readable, packages, without, number):
        self.roles = roles
        if hasattr(os, "sched_setaffinity"):
            # Its processes take turns, and one core wakes them faster than several.
            allowed = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {allowed[number % len(allowed)]})
        for name in PRELOADED:                              # forks need not read them again
            importlib.import_module(name)
        sys.path += packages
        sys.set_int_max_str_digits(0)
        builtins.exit = builtins.quit = sys.exit            # which python -S leaves out
        self.null = os.open(os.devnull, os.O_RDWR)
        self.load = None
        with contextlib.suppress(OSError):                  # not on this system
            self.load = os.open("/proc/loadavg", os.O_RDONLY)
        self.layers = ["rlimits"]
        self.filter = None
        self.add_layers(readable, without)
        gc.collect()
        gc.freeze()                                         # so that forks copy less
        send(0, [self.layers, self.fault()])

    def add_layers(self, readable, without):
        """Add those layers that this system offers, and name them in self.layers."""
        for name, enter in (
                ("no-new-privileges", lambda: system("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)),
                ("mounts", lambda: enter_mounts(readable)),
                ("Landlock", lambda: enter_landlock(readable))):
            if name not in without and "mounts" not in self.layers:     # one of the two is enough
                with contextlib.suppress(OSError, AttributeError):
                    enter()
                    self.layers.append(name)
        if sys.platform == "linux":                         # each fork mounts a private folder
            leave_root(CAP_SYS_ADMIN if "mounts" in self.layers else 0)
        steps = seccomp_filter(platform.machine(), writing="mounts" in self.layers)
        if steps and "seccomp" not in without:
            self.steps = ctypes.create_string_buffer(steps)
            self.filter = struct.pack("HP", len(steps) // 8, ctypes.addressof(self.steps))
            if self.trial(lambda: None) == 0:
                self.layers.append("seccomp")
            else:
                self.filter = None

    def fault(self):
        """Why no program could run here, or None."""
        if self.trial(lambda: None) != 0:
            return "this system does not let us isolate a process"
        if self.trial(lambda: importlib.import_module("csv")) != 0:
            return ("programs that run without root's rights cannot read Python's library, "
                    f"{os.path.dirname(os.__file__)}: install Python where every user may read it")

    def trial(self, body):
        """Run body() in an isolated process -> 0, or how it failed."""
        _, status = os.waitpid(self.fork(body, 9), 0)
        return status

    def fork(self, body, seconds, keep=(), standard=()):
        """Start an isolated process that runs body() -> its id.

        keep: the descriptors that it keeps; standard: those that become its standard streams.
        """
        threads = self.thread_limit()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            self.redirect(keep, standard)
            self.isolate(seconds, threads)
            body()
            status = 0
        except MemoryError:
            status = 3
        finally:
            os._exit(status)

    def redirect(self, keep, standard):
        """Close all descriptors but these."""
        for target, fd in enumerate((*standard, self.null, self.null, self.null)[:3]):
            os.dup2(fd, target)
        lowest = 3
        for fd in sorted(keep):
            os.closerange(lowest, fd)
            lowest = fd + 1
        os.closerange(lowest, 1 << 16)

    def isolate(self, seconds, threads):
        """Add the layers that each process needs for itself."""
        os.setsid()
        scratch_bytes = 0
        if "mounts" in self.layers:
            scratch_bytes = SCRATCH_BYTES
            system("unshare", CLONE_NEWNS)
            mount("tmpfs", SCRATCH, f"size={SCRATCH_BYTES},nr_inodes=1000,mode=1777".encode())
        if sys.platform == "linux":
            set_capabilities(0)
            system("prctl", PR_SET_PDEATHSIG, 9, 0, 0, 0)           # end with the supervisor
        set_limits(CORE=0, FSIZE=scratch_bytes, NOFILE=MOST_FILES, AS=MEMORY_BYTES,
                   CPU=int(seconds) + 2, NPROC=threads)
        if self.filter:
            system("prctl", PR_SET_SECCOMP, 2, self.filter, 0, 0)

    def thread_limit(self):
        """How many threads the user may have: 512 more than there are on the whole system."""
        if not self.filter:
            return 0                            # without seccomp, this is what forbids processes
        if self.load is None:
            return 512
        running_of_all = os.pread(self.load, 99, 0).split()[3]      # such as 2/345
        return int(running_of_all.split(b"/")[1]) + 512

    def end(self, pid, seconds):
        """Give a process some seconds to end, then kill it and its group -> how it ended."""
        deadline = time.monotonic() + seconds
        ended = 0
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0 if ended else 0.001)
        with contextlib.suppress(OSError):
            if not ended:
                os.kill(pid, 9)
            os.killpg(pid, 9)
        if not ended:
            _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)

    def serve(self):
        """Do what the Sandbox at the other end of standard input commands, until it closes it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, 0) as control:
            while True:
                message, fds, _, _ = socket.recv_fds(control, COMMAND.size, 2)
                if len(message) < COMMAND.size:
                    return
                role, pid, seconds = COMMAND.unpack(message)
                if role == END:
                    answer = self.end(pid, seconds)
                elif role == SCRIPT:
                    answer = self.fork(script, seconds, standard=fds)
                else:
                    answer = self.fork(lambda: self.roles[role](*fds), seconds, keep=fds)
                for fd in fds:
                    os.close(fd)
                control.send(ANSWER.pack(answer))


def serve(roles, options):
    """What the bare Python process does."""
    Supervisor(roles, **json.loads(options)).serve()
