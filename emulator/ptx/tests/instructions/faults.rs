//! One test for every kind of fault: found, with its place; and the right code beside it passes.

use tilefold_emulator_ptx::{Access, Fault, FaultKind, Launch, Limits, Memory, Module, OtherBlock, run, run_with};

use crate::harness::{kernel, run_text, try_warp};

fn block(shared: &str, body: &str, threads: usize) -> Result<Vec<u32>, Fault> {
    run_text(&kernel(shared, body, 0, 1, threads), &[], 1, threads)
}

fn fault(shared: &str, body: &str, threads: usize) -> Fault {
    block(shared, body, threads).expect_err(body)
}

const S: &str = ".shared .align 16 .b8 s[256]; .shared .align 16 .b8 t[256];";
const MINE: &str = "mov.u32 %r20, 0; mov.u32 %r10, s; shl.b32 %r11, %thread, 2; add.u32 %r12, %r10, %r11;";

#[test]
fn out_of_bounds() {
    let found = fault("", "mov.u32 %r20, 1; st.global.u32 [%out+4], %r20;", 32);
    let FaultKind::OutOfBounds { space: "global", bytes: 4, detail, .. } = &found.kind else { panic!("{found}") };
    assert_eq!(detail, "offset 128 in an allocation of 128 bytes");
    assert_eq!((found.thread, found.block, &*found.kernel), ([31, 0, 0], [0; 3], "k"));
    assert_eq!(&*found.instruction, "st.global.u32 [%out+4], %r20;");
    let text = kernel("", "mov.u32 %r20, 1; st.global.u32 [%out+4], %r20;", 0, 1, 32);
    let line = text.lines().position(|line| line.contains("[%out+4]")).unwrap() + 1;
    assert_eq!(found.line as usize, line);
    let found = fault("", "mov.u32 %r20, 1; st.global.u32 [%out+-4], %r20;", 32);
    assert!(found.to_string().contains("4 bytes before an allocation of 128 bytes"), "{found}");
    let found = fault("", "mov.u64 %d0, 64; ld.global.u32 %r20, [%d0];", 32);
    assert!(found.to_string().contains("near no allocation"), "{found}");
    // Past the end of shared memory, and between two variables.
    let found = fault(S, &format!("{MINE} st.shared.u32 [%r10+4096], %r20;"), 32);
    assert!(matches!(found.kind, FaultKind::OutOfBounds { space: "shared", .. }), "{found}");
    let found = fault(S, &format!("{MINE} st.shared.u32 [%r10+256], %r20;"), 1);
    assert!(found.to_string().contains("between two variables"), "{found}");
    let found = fault(".local .align 4 .b8 l[8];", "mov.u64 %d0, l; ld.local.u32 %r20, [%d0+8];", 1);
    assert!(matches!(found.kind, FaultKind::OutOfBounds { space: "local", .. }), "{found}");
    let found = fault("", "ld.param.u64 %d0, [out+4]; cvt.u32.u64 %r20, %d0;", 1);
    assert!(matches!(found.kind, FaultKind::Misaligned { space: "parameter", .. }), "{found}");
}

#[test]
fn offsets_that_lose_their_upper_half() {
    // 2^30 elements of 4 bytes: the byte offset needs 33 bits, 32 of them wrap to the start.
    let right = "mov.u32 %r20, 7; mul.wide.u32 %d0, %lane, 4; ";
    block("", &format!("{right} st.global.u32 [%out], %r20;"), 32).unwrap();
    let wrong = "mov.u32 %r10, 0x20000001; mov.u32 %r20, 7; shl.b32 %r11, %r10, 2; cvt.s64.s32 %d0, %r11; add.s64 %d1, %out, %d0; st.global.u32 [%d1], %r20;";
    let found = fault("", wrong, 32);
    assert!(found.to_string().contains("bytes before an allocation"), "{found}");
}

#[test]
fn freed_memory() {
    let text = kernel("", "ld.global.u32 %r20, [%in];", 0, 1, 1);
    let module = Module::parse(&text).unwrap();
    let memory = Memory::new(1 << 20);
    let (from, into) = (memory.allocate(64).unwrap(), memory.allocate(64).unwrap());
    memory.fill32(from, 5, 16).unwrap();
    let mut parameters = from.to_le_bytes().to_vec();
    parameters.extend(into.to_le_bytes());
    let launch = Launch {
        kernel: module.kernel("k").unwrap(),
        module: &module,
        grid: [1; 3],
        block: [1; 3],
        dynamic_shared_bytes: 0,
        parameters: &parameters,
    };
    run(&memory, &launch).unwrap();
    memory.free(from).unwrap();
    let found = run(&memory, &launch).unwrap_err();
    assert!(found.to_string().contains("inside a freed allocation of 64 bytes"), "{found}");
    // A new allocation does not take its place.
    memory.allocate(64).unwrap();
    run(&memory, &launch).unwrap_err();
}

#[test]
fn misaligned() {
    let found = fault("", "mov.u32 %r20, 1; add.s64 %d0, %out, 2; st.global.u32 [%d0], %r20;", 1);
    assert!(matches!(found.kind, FaultKind::Misaligned { space: "global", bytes: 4, .. }), "{found}");
    let found = fault(S, &format!("{MINE} st.shared.v2.u32 [%r12+4], {{%r20, %r20}};"), 1);
    assert!(matches!(found.kind, FaultKind::Misaligned { space: "shared", bytes: 8, .. }), "{found}");
    let found = fault(S, &format!("{MINE} cp.async.ca.shared.global [%r10+4], [%out], 8;"), 1);
    assert!(
        matches!(
            found.kind,
            FaultKind::Misaligned { space: "global", .. }
                | FaultKind::Uninitialised { .. }
                | FaultKind::OutOfBounds { .. }
        ),
        "{found}"
    );
}

#[test]
fn uninitialised_bytes() {
    let found = fault("", "ld.global.u32 %r20, [%out];", 32);
    assert!(matches!(found.kind, FaultKind::Uninitialised { space: "global", bytes: 4, .. }), "{found}");
    // One byte of four is missing.
    let three = "mov.u16 %h0, 1; st.global.u16 [%out], %h0; st.global.u8 [%out+2], %h0;";
    let found = fault("", &format!("{three} ld.global.u32 %r20, [%out];"), 32);
    assert!(matches!(found.kind, FaultKind::Uninitialised { .. }), "{found}");
    block("", &format!("{three} st.global.u8 [%out+3], %h0; ld.global.u32 %r20, [%out];"), 32).unwrap();
    let found = fault(S, &format!("{MINE} ld.shared.u32 %r20, [%r12];"), 32);
    assert!(matches!(found.kind, FaultKind::Uninitialised { space: "shared", .. }), "{found}");
}

#[test]
fn undefined_registers() {
    for body in [
        "st.global.u32 [%out], %r20;",
        "add.u32 %r20, %r21, 1;",
        "setp.eq.u32 %p1, %r21, 1; mov.u32 %r20, 1; @%p1 mov.u32 %r20, 2;",
        "cvt.u64.u32 %d0, %r21; add.s64 %d1, %in, %d0; ld.global.u32 %r20, [%d1];",
        // Defined in some lanes only.
        "setp.lt.u32 %p1, %lane, 31; @%p1 mov.u32 %r21, 1; mov.u32 %r20, %r21;",
        // From the one lane that has none.
        "setp.ne.u32 %p1, %lane, 3; @%p1 mov.u32 %r21, 1; shfl.sync.idx.b32 %r20, %r21, 3, 31, -1;",
    ] {
        let found = fault("", body, 32);
        assert_eq!(found.kind, FaultKind::UndefinedValue, "{body}");
    }
    // An unset value that nobody uses is none of our business.
    block("", "setp.lt.u32 %p1, %lane, 31; @%p1 mov.u32 %r21, 1; selp.u32 %r20, %r21, 5, %p1; mov.u32 %r22, %r23;", 32)
        .unwrap();
    let local = ".local .align 4 .b8 l[8];";
    let body = "mov.u64 %d0, l; ld.local.u32 %r21, [%d0]; mov.u32 %r20, 1;";
    block(local, body, 32).unwrap();
    assert_eq!(fault(local, &format!("{body} mov.u32 %r20, %r21;"), 32).kind, FaultKind::UndefinedValue);
}

#[test]
fn races_between_warps() {
    let neighbour = "xor.b32 %r13, %r11, 128; add.u32 %r13, %r10, %r13;";
    let write_read = |barrier: &str| {
        format!("{MINE} {neighbour} st.shared.u32 [%r12], %thread; {barrier} ld.shared.u32 %r20, [%r13];")
    };
    block(S, &write_read("bar.sync 0;"), 64).unwrap();
    let found = fault(S, &write_read(""), 64);
    assert!(matches!(found.kind, FaultKind::Uninitialised { .. }), "{found}");
    // With both halves set before, the missing barrier is a race.
    let found = fault(
        S,
        &format!(
            "{MINE} {neighbour} st.shared.u32 [%r12], %thread; bar.sync 0; st.shared.u32 [%r12], %thread; ld.shared.u32 %r20, [%r13];"
        ),
        64,
    );
    let FaultKind::SharedRace { access: Access::Read | Access::Write, other, .. } = found.kind else {
        panic!("{found}")
    };
    assert_eq!(other, found.thread[0] ^ 32);
    // A read, then a write of the other warp: the missing second barrier of a loop.
    let found = fault(
        S,
        &format!(
            "{MINE} {neighbour} st.shared.u32 [%r12], %thread; bar.sync 0; setp.lt.u32 %p1, %thread, 32; @%p1 ld.shared.u32 %r20, [%r13]; @!%p1 st.shared.u32 [%r12], %r20;"
        ),
        64,
    );
    assert!(
        matches!(found.kind, FaultKind::SharedRace { access: Access::Write, earlier: Access::Read, .. }),
        "{found}"
    );
    block(S, &format!("{MINE} {neighbour} st.shared.u32 [%r12], %thread; bar.sync 0; ld.shared.u32 %r20, [%r13]; bar.sync 0; st.shared.u32 [%r12], %r20;"), 64).unwrap();
    // A barrier that joins other warps than those two orders nothing.
    let named = "setp.ge.u32 %p1, %thread, 32; @%p1 bra JOIN; st.shared.u32 [%r10], %r20; bra END; JOIN: bar.sync 1, 64; setp.eq.u32 %p2, %thread, 40; @%p2 st.shared.u32 [%r10], %r20; END:";
    let found = fault(S, &format!("{MINE} {named}"), 96);
    assert!(matches!(found.kind, FaultKind::SharedRace { .. }), "{found}");
    // Nor does the synchronisation of one warp order it after another.
    let found = fault(S, &format!("{MINE} bar.warp.sync -1; st.shared.u32 [%r10], %r20; bar.warp.sync -1;"), 64);
    assert!(matches!(found.kind, FaultKind::SharedRace { .. }), "{found}");
}

#[test]
fn races_inside_a_warp() {
    let reverse = "sub.u32 %r13, 124, %r11; add.u32 %r13, %r10, %r13;";
    let body =
        |sync: &str| format!("{MINE} {reverse} st.shared.u32 [%r12], %thread; {sync} ld.shared.u32 %r20, [%r13];");
    block(S, &body("bar.warp.sync -1;"), 32).unwrap();
    // Neither the order of instructions nor a shuffle orders memory.
    for sync in ["", "shfl.sync.idx.b32 %r14, %r11, 0, 31, -1;"] {
        let found = fault(S, &body(sync), 32);
        assert!(
            matches!(found.kind, FaultKind::SharedRace { access: Access::Read, earlier: Access::Write, .. }),
            "{found}"
        );
    }
    // One place written by all lanes: with one value it is clear what it holds.
    block(S, &format!("{MINE} st.shared.u32 [%r10], %r20;"), 32).unwrap();
    let found = fault(S, &format!("{MINE} st.shared.u32 [%r10], %lane;"), 32);
    assert!(
        matches!(found.kind, FaultKind::SharedRace { access: Access::Write, earlier: Access::Write, .. }),
        "{found}"
    );
    // Atomics may meet, but not plain accesses.
    let zero = "setp.eq.u32 %p1, %lane, 0; @%p1 st.shared.u32 [%r10], %r20; bar.warp.sync -1; atom.shared.add.u32 %r20, [%r10], 1;";
    block(S, &format!("{MINE} {zero} bar.warp.sync -1; ld.shared.u32 %r20, [%r10];"), 32).unwrap();
    let found = fault(S, &format!("{MINE} {zero} ld.shared.u32 %r20, [%r10];"), 32);
    assert!(matches!(found.kind, FaultKind::SharedRace { earlier: Access::Atomic, .. }), "{found}");
}

/// Runs a kernel whose body may use the block's index in `%r0` on several blocks.
fn grid(body: &str, blocks: u32) -> Result<(), Fault> {
    let text = kernel(
        "",
        &format!("mov.u32 %r0, %ctaid.x; mul.wide.u32 %d0, %r0, 4; add.s64 %d1, %out, %d0; {body}"),
        0,
        0,
        1,
    );
    let module = Module::parse(&text).unwrap();
    let memory = Memory::new(1 << 20);
    let (from, into) = (memory.allocate(64).unwrap(), memory.allocate(64).unwrap());
    memory.fill32(from, 5, 16).unwrap();
    memory.fill32(into, 6, 16).unwrap();
    let mut parameters = from.to_le_bytes().to_vec();
    parameters.extend(into.to_le_bytes());
    let launch = Launch {
        kernel: module.kernel("k").unwrap(),
        module: &module,
        grid: [blocks, 1, 1],
        block: [1; 3],
        dynamic_shared_bytes: 0,
        parameters: &parameters,
    };
    run(&memory, &launch).map(|_| ())
}

#[test]
fn races_between_blocks() {
    grid("ld.global.u32 %r1, [%in]; st.global.u32 [%d1], %r1; ld.global.u32 %r1, [%d1];", 16).unwrap();
    let found = grid("st.global.u32 [%out], %r0;", 2).unwrap_err();
    assert!(
        matches!(
            found.kind,
            FaultKind::GlobalRace { access: Access::Write, earlier: Access::Write, other: OtherBlock::Block(_), .. }
        ),
        "{found}"
    );
    // Every block reads its neighbour's element and writes its own.
    let found = grid("ld.global.u32 %r1, [%d1+4]; st.global.u32 [%d1], %r1;", 15).unwrap_err();
    assert!(matches!(found.kind, FaultKind::GlobalRace { .. }), "{found}");
    // Neighbouring bytes are no race; the same byte is.
    grid("add.s64 %d2, %out, %d0; shr.u64 %d0, %d0, 2; add.s64 %d2, %out, %d0; st.global.u8 [%d2], %r0;", 16).unwrap();
    grid("atom.global.add.u32 %r1, [%out], 1; red.global.max.u32 [%out], %r0;", 16).unwrap();
    let found = grid("atom.global.add.u32 %r1, [%out], 1; ld.global.u32 %r1, [%out];", 2).unwrap_err();
    assert!(matches!(found.kind, FaultKind::GlobalRace { .. }), "{found}");
}

#[test]
fn copies_touched_before_their_wait() {
    let start = "mov.u32 %r10, s; shl.b32 %r11, %lane, 4; add.u32 %r10, %r10, %r11; mov.u32 %r20, 0;
        cp.async.ca.shared.global [%r10], [%in+-0], 4; cp.async.commit_group; cp.async.ca.shared.global [%r10+4], [%in], 4; cp.async.commit_group;";
    let body = |rest: &str| try_warp(".shared .align 16 .b8 s[512];", &format!("{start} {rest}"), &[[3; 32]], 1);
    body("cp.async.wait_group 1; ld.shared.u32 %r20, [%r10];").unwrap();
    body("cp.async.wait_group 0; ld.shared.u32 %r20, [%r10+4];").unwrap();
    for rest in [
        "ld.shared.u32 %r20, [%r10];",
        // The wrong number of groups.
        "cp.async.wait_group 1; ld.shared.u32 %r20, [%r10+4];",
        "cp.async.wait_group 2; ld.shared.u32 %r20, [%r10];",
        "st.shared.u32 [%r10], %r20;",
    ] {
        let found = body(rest).expect_err(rest);
        assert!(matches!(found.kind, FaultKind::PendingCopy { .. }), "{rest}: {found}");
    }
    // The wait of one thread makes nothing visible to another: a barrier does.
    let other = "xor.b32 %r13, %r11, 16; mov.u32 %r14, s; add.u32 %r13, %r14, %r13;";
    let found = body(&format!("cp.async.wait_all; {other} ld.shared.u32 %r20, [%r13];")).unwrap_err();
    assert!(matches!(found.kind, FaultKind::SharedRace { .. }), "{found}");
    body(&format!("cp.async.wait_all; {other} bar.warp.sync -1; ld.shared.u32 %r20, [%r13];")).unwrap();
    // A copy into what another thread may still be reading.
    let reread = format!(
        "cp.async.wait_all; {other} bar.warp.sync -1; ld.shared.u32 %r20, [%r13]; cp.async.ca.shared.global [%r10], [%in], 4; cp.async.wait_all;"
    );
    let found = body(&reread).unwrap_err();
    assert!(
        matches!(found.kind, FaultKind::SharedRace { access: Access::Write, earlier: Access::Read, .. }),
        "{found}"
    );
    let found = body("cp.async.ca.shared.global [%r10+8], [%in], 4, 5;").unwrap_err();
    assert!(matches!(found.kind, FaultKind::CopySize { source_bytes: 5, bytes: 4 }), "{found}");
}

#[test]
fn partial_warps() {
    let some = "mov.u32 %r20, 1; setp.ge.u32 %p1, %lane, 8; @%p1 bra END;";
    let found = fault("", &format!("{some} shfl.sync.idx.b32 %r20, %r20, 0, 31, -1; END:"), 32);
    assert!(matches!(found.kind, FaultKind::PartialWarp { missing: 0xFFFF_FF00 }), "{found}");
    assert_eq!(found.thread, [0, 0, 0]);
    block("", &format!("{some} shfl.sync.idx.b32 %r20, %r20, 0, 31, 255; END:"), 32).unwrap();
    // Lanes that have left, and lanes that the block does not have.
    let found = fault(
        "",
        "mov.u32 %r20, 1; st.global.u32 [%out], %r20; setp.ge.u32 %p1, %lane, 8; @%p1 ret; vote.sync.any.pred %p2, %p1, -1;",
        32,
    );
    assert!(matches!(found.kind, FaultKind::PartialWarp { missing: 0xFFFF_FF00 }), "{found}");
    let found = fault("", "mov.u32 %r20, 1; bar.warp.sync -1;", 20);
    assert!(matches!(found.kind, FaultKind::PartialWarp { missing: 0xFFF0_0000 }), "{found}");
    // Both sides wait for each other at different instructions.
    let found = fault(
        "",
        "mov.u32 %r20, 1; setp.ge.u32 %p1, %lane, 8; @%p1 bra OTHER; bar.warp.sync -1; bra END; OTHER: bar.warp.sync -1; END:",
        32,
    );
    assert!(matches!(found.kind, FaultKind::PartialWarp { .. }), "{found}");
    let found = fault("", &format!("{some} shfl.sync.idx.b32 %r20, %r20, 0, 31, 0xF; END:"), 32);
    assert!(matches!(found.kind, FaultKind::NotAMember { members: 0xF }), "{found}");
    assert_eq!(found.thread, [4, 0, 0]);
    let mma = "mov.f32 %f0, 0f00000000; mov.u32 %r1, 0; mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r1}, {%r1}, {%f0, %f0, %f0, %f0};";
    let found = fault("", &format!("{some} {mma} END:"), 32);
    assert!(matches!(found.kind, FaultKind::PartialWarp { missing: 0xFFFF_FF00 }), "{found}");
}

#[test]
fn barriers_that_never_complete() {
    let found = fault(
        "",
        "mov.u32 %r20, 1; setp.ge.u32 %p1, %thread, 32; @%p1 bra OTHER; bar.sync 0; bra END; OTHER: bar.sync 1; END:",
        64,
    );
    assert!(matches!(found.kind, FaultKind::Barrier { id: 0, .. }), "{found}");
    let found = fault("", "mov.u32 %r20, 1; setp.ge.u32 %p1, %thread, 32; @%p1 bra END; bar.sync 0, 64; END:", 64);
    assert!(found.to_string().contains("never completes; warps: 0 at barrier 0, 1 has left"), "{found}");
    let found = fault("", "mov.u32 %r20, 1; bar.sync 0, 33;", 64);
    assert!(found.to_string().contains("no whole warps"), "{found}");
    // Half of a warp is at the barrier, half at another instruction that waits for all.
    let found = fault(
        "",
        "mov.u32 %r20, 1; setp.ge.u32 %p1, %lane, 16; @%p1 bra OTHER; bar.sync 0; bra END; OTHER: bar.warp.sync -1; END:",
        32,
    );
    assert!(matches!(found.kind, FaultKind::PartialWarp { missing: 0xFFFF }), "{found}");
    // Warps that have left count as arrived.
    block("", "mov.u32 %r20, 1; setp.ge.u32 %p1, %thread, 32; @%p1 bra END; bar.sync 0; END:", 64).unwrap();
}

#[test]
fn division_by_zero_traps_and_endless_loops() {
    let found = fault("", "sub.u32 %r10, %lane, 3; div.u32 %r20, 7, %r10;", 32);
    assert_eq!((found.kind, found.thread), (FaultKind::DivisionByZero, [3, 0, 0]));
    let found = fault("", "mov.u32 %r20, 1; setp.eq.u32 %p1, %lane, 5; @%p1 trap;", 32);
    assert_eq!((found.kind, found.thread), (FaultKind::Trap, [5, 0, 0]));
    let found = fault("", "mov.u32 %r20, 1; mov.u32 %r10, 9; T: .branchtargets A, A; brx.idx %r10, T; A:", 1);
    assert_eq!(found.kind, FaultKind::BranchIndex { index: 9 });
    let module = Module::parse(&kernel("", "L: bra L;", 0, 0, 32)).unwrap();
    let launch = Launch {
        kernel: module.kernel("k").unwrap(),
        module: &module,
        grid: [2, 1, 1],
        block: [32, 1, 1],
        dynamic_shared_bytes: 0,
        parameters: &[0; 16],
    };
    let found = run_with(&Memory::new(0), &launch, Limits { warp_instructions_per_block: 1000 }).unwrap_err();
    assert_eq!((found.kind, &*found.instruction), (FaultKind::BudgetExhausted { warp_instructions: 1000 }, "bra L;"));
}

#[test]
fn launches() {
    let module = Module::parse(&kernel("", "", 0, 0, 32).replace("\n{", "\n.maxntid 64, 1, 1\n{")).unwrap();
    let memory = Memory::new(0);
    let right = Launch {
        kernel: module.kernel("k").unwrap(),
        module: &module,
        grid: [1; 3],
        block: [64, 1, 1],
        dynamic_shared_bytes: 0,
        parameters: &[0; 16],
    };
    run(&memory, &right).unwrap();
    for wrong in [
        Launch { grid: [0, 1, 1], ..right },
        Launch { grid: [1, 70_000, 1], ..right },
        Launch { block: [65, 1, 1], ..right },
        Launch { block: [64, 0, 1], ..right },
        Launch { dynamic_shared_bytes: 200_000, ..right },
        Launch { parameters: &[0; 15], ..right },
    ] {
        let found = run(&memory, &wrong).unwrap_err();
        assert!(matches!(found.kind, FaultKind::Launch { .. }), "{found}");
    }
}

#[test]
fn the_first_block_with_a_fault_is_named() {
    let text = kernel("", "mov.u32 %r0, %ctaid.x; setp.lt.u32 %p1, %r0, 37; @%p1 ret; trap;", 0, 0, 1);
    let module = Module::parse(&text).unwrap();
    let launch = Launch {
        kernel: module.kernel("k").unwrap(),
        module: &module,
        grid: [5, 5, 5],
        block: [1; 3],
        dynamic_shared_bytes: 0,
        parameters: &[0; 16],
    };
    run(&Memory::new(0), &launch).unwrap();
    let text = text.replace("%ctaid.x", "%ctaid.y").replace("37", "3");
    let module = Module::parse(&text).unwrap();
    let launch = Launch { kernel: module.kernel("k").unwrap(), module: &module, ..launch };
    assert_eq!(run(&Memory::new(0), &launch).unwrap_err().block, [0, 3, 0]);
}
