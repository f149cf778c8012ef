// Between a process and the kernel: system calls that change files under one directory are counted, and the n-th of them
// fails, or is the last thing that the process does. So a fault is at a place, and not at a moment.
//
// A seccomp filter turns each such call into a SIGSYS, whose handler makes it or does not. Unlike a library before libc
// this sees the calls that Rust makes without libc, too (safetensors renames its files so). Python speaks to it by ctypes
// (shim.py). A filter stays for good, so only scripts of their own install it.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

// A system call from the one place from which the filter lets it pass: number, then six arguments.
extern "C" long inq_raw(long number, long a, long b, long c, long d, long e, long f);
extern "C" const char inq_raw_end[];

#if defined(__x86_64__)
asm(R"(
  .text
  .balign 64
  .globl inq_raw, inq_raw_end
  .hidden inq_raw, inq_raw_end
inq_raw:
  movq %rdi, %rax
  movq %rsi, %rdi
  movq %rdx, %rsi
  movq %rcx, %rdx
  movq %r8, %r10
  movq %r9, %r8
  movq 8(%rsp), %r9
  syscall
  ret
inq_raw_end:
)");
#elif defined(__aarch64__)
asm(R"(
  .text
  .balign 64
  .globl inq_raw, inq_raw_end
  .hidden inq_raw, inq_raw_end
inq_raw:
  mov x8, x0
  mov x0, x1
  mov x1, x2
  mov x2, x3
  mov x3, x4
  mov x4, x5
  mov x5, x6
  svc #0
  ret
inq_raw_end:
)");
#else
#error "faults are injected on x86-64 and aarch64 only"
#endif

namespace {

enum Mode {
  kCount = 0,     // nothing fails
  kOnce = 1,      // the n-th call fails with `code`
  kFromHere = 2,  // the n-th and all after it: a disk that is full, or gone
  kShort = 3,     // the n-th call, if it writes, writes half of it; the one after it fails
  kKill = 4,      // SIGKILL instead of the n-th call
  kKillHalf = 5,  // the same, but half of what it would write is written before
};

// Where a call says which file it is about: a path, or a directory's descriptor and a path, or a descriptor.
enum Where { kPath0, kPath1, kAt0, kAt2, kFd0, kFd2 };

struct Call {
  long number;
  const char* name;
  Where where;
  bool writes;  // could be done by half: descriptor, memory, length
  bool space;   // takes space on the disk
};

constexpr Call kCalls[] = {
#ifdef SYS_open
    {SYS_open, "open", kPath0, false, false},
    {SYS_creat, "open", kPath0, false, true},
    {SYS_mkdir, "mkdir", kPath0, false, true},
    {SYS_rmdir, "rmdir", kPath0, false, false},
    {SYS_unlink, "unlink", kPath0, false, false},
    {SYS_rename, "rename", kPath1, false, false},
    {SYS_chmod, "chmod", kPath0, false, false},
    {SYS_link, "link", kPath1, false, true},
#endif
#ifdef SYS_renameat
    {SYS_renameat, "rename", kAt2, false, false},
#endif
    {SYS_openat, "open", kAt0, false, false},
    {SYS_mkdirat, "mkdir", kAt0, false, true},
    {SYS_unlinkat, "unlink", kAt0, false, false},
    {SYS_renameat2, "rename", kAt2, false, false},
    {SYS_linkat, "link", kAt2, false, true},
    {SYS_fchmodat, "chmod", kAt0, false, false},
    {SYS_fchmod, "chmod", kFd0, false, false},
    {SYS_write, "write", kFd0, true, true},
    {SYS_pwrite64, "write", kFd0, true, true},
    {SYS_writev, "write", kFd0, false, true},
    {SYS_pwritev, "write", kFd0, false, true},
    {SYS_sendfile, "copy", kFd0, false, true},
    {SYS_copy_file_range, "copy", kFd2, false, true},
    {SYS_ftruncate, "truncate", kFd0, false, true},
    {SYS_fallocate, "truncate", kFd0, false, true},
    {SYS_fsync, "fsync", kFd0, false, true},
    {SYS_fdatasync, "fsync", kFd0, false, true},
};
constexpr int kCallCount = sizeof kCalls / sizeof kCalls[0];
constexpr int kMost = 4096;

char prefix[PATH_MAX];
volatile long at = 0, count = 0;
volatile int mode = kCount, code = 0;
volatile bool armed = false;
const Call* seen[kMost];

bool ours(const char* path) { return path != nullptr && strncmp(path, prefix, strlen(prefix)) == 0; }

// A descriptor's path is in /proc; that of a file which was deleted keeps its name there.
bool ours(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return false;
  path[length] = 0;
  return ours(static_cast<const char*>(path));
}

bool ours(int directory, const char* path) {
  return path != nullptr && path[0] != '/' && directory != AT_FDCWD ? ours(directory) : ours(path);
}

bool ours(const Call& call, const long* a) {
  const auto path = [&](int i) { return reinterpret_cast<const char*>(a[i]); };
  switch (call.where) {
    case kPath0: return ours(path(0));
    case kPath1: return ours(path(1));
    case kAt0: return ours(static_cast<int>(a[0]), path(1));
    case kAt2: return ours(static_cast<int>(a[2]), path(3));
    case kFd0: return ours(static_cast<int>(a[0]));
    default: return ours(static_cast<int>(a[2]));
  }
}

bool creates(const Call& call, const long* a) {
#ifdef SYS_open
  if (call.number == SYS_open) return (a[1] & O_CREAT) != 0;
#endif
  return call.number == SYS_openat && (a[2] & O_CREAT) != 0;
}

[[noreturn]] void die() {
  inq_raw(SYS_kill, getpid(), SIGKILL, 0, 0, 0, 0);
  for (;;) pause();
}

long make(long number, const long* a) { return inq_raw(number, a[0], a[1], a[2], a[3], a[4], a[5]); }

// Half of a write; all of any other call.
long half(const Call& call, const long* a) {
  long b[6] = {a[0], a[1], call.writes ? a[2] / 2 : a[2], a[3], a[4], a[5]};
  return make(call.number, b);
}

// What the call gives back: a result, or an error's number below zero.
long answer(const Call& call, const long* a) {
  if (!armed || !ours(call, a)) return make(call.number, a);
  const long i = ++count;
  if (i <= kMost) seen[i - 1] = &call;
  // A full disk still lets files be deleted, renamed and read; one with errors lets nothing.
  const bool hit = code != ENOSPC || call.space || creates(call, a);
  switch (mode) {
    case kOnce: return i == at ? -code : make(call.number, a);
    case kFromHere: return i >= at && hit ? -code : make(call.number, a);
    case kShort:
      if (i == at && call.writes && a[2] > 1) return half(call, a);
      return i == at + 1 ? -code : make(call.number, a);
    case kKill:
      if (i == at) die();
      return make(call.number, a);
    case kKillHalf:
      if (i == at) {
        if (call.writes) half(call, a);
        die();
      }
      return make(call.number, a);
    default: return make(call.number, a);
  }
}

void handler(int, siginfo_t* info, void* context) {
  const int before = errno;
  auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  auto* r = machine.gregs;
  const long a[6] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
  auto& result = r[REG_RAX];
#else
  long a[6];
  for (int i = 0; i < 6; ++i) a[i] = static_cast<long>(machine.regs[i]);
  auto& result = machine.regs[0];
#endif
  for (const Call& call : kCalls) {
    if (call.number == info->si_syscall) {
      result = answer(call, a);
      break;
    }
  }
  errno = before;
}

}  // namespace

#define INQ_API extern "C" __attribute__((visibility("default")))

// 0, or the error's number if this kernel allows no filters.
INQ_API int inq_fault_install() {
  struct sigaction action = {};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  if (sigaction(SIGSYS, &action, nullptr) != 0) return errno;
  const auto begin = reinterpret_cast<uint64_t>(&inq_raw), end = reinterpret_cast<uint64_t>(inq_raw_end);
  if (begin >> 32 != end >> 32) return ERANGE;
  constexpr uint32_t kIp = offsetof(seccomp_data, instruction_pointer);
  sock_filter filter[8 + kCallCount] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, kIp + 4),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(begin >> 32), 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, kIp),
      BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, static_cast<uint32_t>(begin), 0, 1),
      // Before the end of inq_raw: allowed.
      BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, static_cast<uint32_t>(end), 0, kCallCount + 1),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
  };
  for (int i = 0; i < kCallCount; ++i) {
    const auto number = static_cast<uint32_t>(kCalls[i].number);
    filter[6 + i] = BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, static_cast<uint8_t>(kCallCount - i), 0);
  }
  filter[6 + kCallCount] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  filter[7 + kCallCount] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
  sock_fprog program = {static_cast<unsigned short>(8 + kCallCount), filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return errno;
  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) return errno;
  return 0;
}

INQ_API void inq_fault_arm(const char* directory, int how, long n, int error) {
  armed = false;
  strncpy(prefix, directory, sizeof prefix - 1);
  mode = how, at = n, code = error, count = 0;
  armed = directory[0] != 0;
}

INQ_API long inq_fault_count() { return count; }

// The kind of the i-th call, from 0, since arming: "write", "fsync", …
INQ_API const char* inq_fault_name(long i) { return i < count && i < kMost ? seen[i]->name : ""; }

INQ_API int inq_fault_writes(long i) { return i < count && i < kMost && seen[i]->writes; }
