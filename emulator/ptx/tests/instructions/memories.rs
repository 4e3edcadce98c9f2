//! Loads, stores and atomics in every state space, and asynchronous copies.

use std::array::from_fn;

use tilefold_emulator_ptx::{Launch, Memory, Module, run};

use crate::harness::{check, kernel, run_text, try_warp, warp};

#[test]
fn widths_and_vectors() {
    let shared = ".shared .align 16 .b8 s[512];";
    let body = "mov.u32 %r10, s; shl.b32 %r11, %lane, 4; add.u32 %r10, %r10, %r11;
        mov.u32 %r12, 0x80FF7F01; mov.u32 %r13, 0x11223344; st.shared.v4.u32 [%r10], {%r12, %r13, %lane, %r12};
        ld.shared.s8 %r20, [%r10+2]; ld.shared.u8 %r21, [%r10+3]; ld.shared.u16 %h0, [%r10+4]; cvt.u32.u16 %r22, %h0; ld.shared.s16 %r23, [%r10+2];
        ld.shared.v2.u16 {%h1, %h2}, [%r10+4]; mov.b32 %r24, {%h2, %h1}; ld.shared.v4.u8 {%h1, %h2, %h3, %h4}, [%r10+4]; cvt.u32.u16 %r25, %h3;
        ld.shared.v2.b64 {%d1, %d2}, [%r10]; mov.b64 {%r26, %r27}, %d2; ld.shared.s32 %d3, [%r10]; shr.u64 %d3, %d3, 32; cvt.u32.u64 %r28, %d3;";
    let found = try_warp(shared, body, &[], 9).unwrap();
    let of_lane: Vec<u32> = found.iter().map(|lanes| lanes[5]).collect();
    assert_eq!(of_lane, [u32::MAX, 0x80, 0x3344, 0xFFFF_80FF, 0x3344_1122, 0x22, 5, 0x80FF_7F01, u32::MAX]);
}

#[test]
fn partial_stores_keep_their_neighbours() {
    let body = "mov.u32 %r10, 0x11223344; st.global.u32 [%out], %r10; mov.u16 %h0, 0xABCD; st.global.u16 [%out+2], %h0; st.global.u8 [%out], %h0; ld.global.u32 %r20, [%out];";
    assert_eq!(warp(body, &[], 1)[0], [0xABCD_33CD; 32]);
}

#[test]
fn generic_addresses_find_their_space() {
    let shared = ".shared .align 4 .b8 s[128]; .local .align 8 .b8 l[16];";
    let body = "mov.u64 %d0, s; cvta.shared.u64 %d1, %d0; mul.wide.u32 %d2, %lane, 4; add.s64 %d1, %d1, %d2; st.u32 [%d1], %lane;
        mov.u64 %d3, l; cvta.local.u64 %d4, %d3; add.u32 %r10, %lane, 7; st.u32 [%d4+8], %r10; ld.local.u32 %r21, [%d3+8]; ld.u32 %r22, [%d4+8];
        cvta.to.shared.u64 %d5, %d1; cvt.u32.u64 %r11, %d5; ld.shared.u32 %r20, [%r11]; ld.u32 %r23, [%in];";
    let found = try_warp(shared, body, &[[9; 32]], 4).unwrap();
    assert_eq!(found[0], from_fn(|lane| lane as u32));
    assert_eq!(found[1], from_fn(|lane| lane as u32 + 7));
    assert_eq!(found[2], found[1]);
    assert_eq!(found[3], [9; 32]);
}

const MODULE: &str = "
.version 8.0
.target sm_80
.address_size 64
.const .align 4 .b8 table[8] = {1, 0, 0, 0, 255, 255, 255, 255};
.global .align 4 .u32 counter = 5;
.global .align 8 .b8 zeros[16];
.extern .shared .align 16 .b8 dynamic[];
.visible .entry k(.param .align 8 .b8 p[24], .param .u8 flag)
{
    .reg .b32 %r<20>; .reg .b64 %d<10>; .reg .pred %p<3>;
    .shared .align 4 .u32 one;
    mov.u32 %r1, %tid.x;
    mov.b64 %d5, p; add.s64 %d6, %d5, 16; ld.param.u64 %d0, [p]; ld.param.u32 %r2, [%d6+-8]; ld.param.s32 %r3, [p+12]; ld.param.u8 %r4, [flag];
    mov.u64 %d1, counter; atom.global.add.u32 %r5, [%d1], 2;
    ld.const.u32 %r6, [table+4]; mov.u64 %d2, table; ld.const.u32 %r7, [%d2];
    ld.global.u64 %d3, [zeros+8]; cvt.u32.u64 %r8, %d3;
    mov.u32 %r9, dynamic; shl.b32 %r10, %r1, 2; add.u32 %r9, %r9, %r10; st.shared.u32 [%r9], %r1;
    setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [one], %r3;
    bar.sync 0;
    xor.b32 %r11, %r10, 4; mov.u32 %r12, dynamic; add.u32 %r11, %r12, %r11; ld.shared.u32 %r13, [%r11]; ld.shared.u32 %r14, [one];
    mul.wide.u32 %d4, %r1, 32; add.s64 %d4, %d0, %d4;
    st.global.v4.u32 [%d4], {%r2, %r14, %r4, %r6}; st.global.v4.u32 [%d4+16], {%r7, %r8, %r13, %r1};
    ret;
}
";

#[test]
fn parameters_variables_and_dynamic_shared_memory() {
    let module = Module::parse(MODULE).unwrap();
    let kernel = module.kernel("k").unwrap();
    assert_eq!((kernel.parameter_bytes, kernel.static_shared_bytes), (25, 4));
    assert_eq!(
        kernel.parameters.iter().map(|p| (p.offset, p.bytes, p.align)).collect::<Vec<_>>(),
        [(0, 24, 8), (24, 1, 1)]
    );
    let memory = Memory::new(1 << 20);
    let out = memory.allocate(64 * 32).unwrap();
    let mut parameters = out.to_le_bytes().to_vec();
    parameters.extend(77u32.to_le_bytes());
    parameters.extend((-3i32).to_le_bytes());
    parameters.extend([0; 8]);
    parameters.push(200);
    let launch = Launch {
        kernel,
        module: &module,
        grid: [1; 3],
        block: [64, 1, 1],
        dynamic_shared_bytes: 256,
        parameters: &parameters,
    };
    run(&memory, &launch).unwrap();
    run(&memory, &launch).unwrap();
    let mut bytes = vec![0; 64 * 32];
    memory.read(out, &mut bytes).unwrap();
    for (thread, record) in bytes.as_chunks::<32>().0.iter().enumerate() {
        let words: Vec<u32> = record.as_chunks::<4>().0.iter().map(|w| u32::from_le_bytes(*w)).collect();
        assert_eq!(words, [77, u32::MAX - 2, 200, u32::MAX, 1, 0, thread as u32 ^ 1, thread as u32]);
    }
    let (counter, size) = memory.variable(&module, "counter").unwrap().unwrap();
    let mut count = [0; 4];
    memory.read(counter, &mut count).unwrap();
    assert_eq!((u32::from_le_bytes(count), size), (5 + 2 * 64 * 2, 4));
    let held = memory.free_bytes();
    memory.unload(&module);
    assert_eq!(memory.free_bytes(), held + 4 + 16);
}

#[test]
fn atomics_of_one_thread() {
    // Memory first holds %r0, the operand is %r1; out come the old and the new value.
    let body = |op: &str| {
        format!("st.global.u32 [%out], %r0; atom.global.{op} %r20, [%out], %r1; ld.global.u32 %r21, [%out];")
    };
    let neg = i32::cast_unsigned;
    check(&body("add.u32"), &[([5, 7], [5, 12])]);
    check(&body("min.s32"), &[([5, neg(-7)], [5, neg(-7)])]);
    check(&body("min.u32"), &[([5, neg(-7)], [5, 5])]);
    check(&body("max.s32"), &[([5, neg(-7)], [5, 5])]);
    check(&body("max.u32"), &[([5, neg(-7)], [5, neg(-7)])]);
    check(&body("and.b32"), &[([12, 10], [12, 8])]);
    check(&body("or.b32"), &[([12, 10], [12, 14])]);
    check(&body("xor.b32"), &[([12, 10], [12, 6])]);
    check(&body("exch.b32"), &[([12, 10], [12, 10])]);
    check(&body("inc.u32"), &[([5, 7], [5, 6]), ([7, 7], [7, 0])]);
    check(&body("dec.u32"), &[([5, 7], [5, 4]), ([0, 7], [0, 7]), ([9, 7], [9, 7])]);
    let swap = "st.global.u32 [%out], %r0; atom.global.cas.b32 %r20, [%out], 4, %r1; ld.global.u32 %r21, [%out];";
    check(swap, &[([4, 9], [4, 9]), ([5, 9], [5, 5])]);
    let wide = ".shared .align 8 .b64 s;";
    let body = "mov.u64 %d1, -1; setp.eq.u32 %p1, %lane, 0; @%p1 st.shared.u64 [s], %d1; bar.sync 0; mov.u64 %d2, 2; red.shared.add.u64 [s], %d2; bar.sync 0; ld.shared.u64 %d3, [s]; mov.b64 {%r20, %r21}, %d3;";
    let found = try_warp(wide, body, &[], 2).unwrap();
    assert_eq!((found[0][3], found[1][3]), (63, 0));
}

/// Two groups of copies in flight; `wait` decides which of them may be read.
fn copies(wait: &str) -> String {
    format!(
        "mov.u32 %r10, s; shl.b32 %r11, %lane, 4; add.u32 %r10, %r10, %r11; mul.wide.u32 %d1, %lane, 12; add.s64 %d0, %in, %d1;
        cp.async.ca.shared.global [%r10], [%d0], 16; cp.async.commit_group;
        cp.async.ca.shared.global [%r10+512], [%d0], 8; cp.async.ca.shared.global [%r10+520], [%d0+12], 4; cp.async.commit_group;
        {wait}
        ld.shared.u32 %r20, [%r10+12]; ld.shared.u32 %r21, [%r10+516]; ld.shared.u32 %r22, [%r10+520];"
    )
}

#[test]
fn asynchronous_copies_arrive_with_their_wait() {
    let inputs: Vec<[u32; 32]> = (0..4).map(|i| from_fn(|lane| 100 * i + lane as u32)).collect();
    let due = |word: usize| -> [u32; 32] { from_fn(|lane| inputs[(4 * lane + word) / 32][(4 * lane + word) % 32]) };
    for wait in ["cp.async.wait_group 0;", "cp.async.wait_all;", "cp.async.wait_group 1; cp.async.wait_group 0;"] {
        let found = try_warp(".shared .align 16 .b8 s[1024];", &copies(wait), &inputs, 3).unwrap();
        assert_eq!(found, [due(3), due(1), due(3)]);
    }
}

#[test]
fn short_sources_are_filled_with_zeros() {
    let body = "mov.u32 %r10, s; shl.b32 %r11, %lane, 4; add.u32 %r10, %r10, %r11; mul.wide.u32 %d1, %lane, 12; add.s64 %d0, %in, %d1;
        cp.async.cg.shared.global [%r10], [%d0], 16, %r0; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.v4.u32 {%r20, %r21, %r22, %r23}, [%r10];";
    // Sizes 0 to 16 by lane in the first row of inputs, which lanes also copy from.
    let inputs: Vec<[u32; 32]> = (0..4)
        .map(|i| from_fn(|lane| if i == 0 { lane as u32 % 17 } else { 0x0101_0101 * (lane as u32 + 1) }))
        .collect();
    let found = try_warp(".shared .align 16 .b8 s[512];", body, &inputs, 4).unwrap();
    for lane in 0..32 {
        let mut bytes: Vec<u8> =
            (0..4).flat_map(|w| inputs[(4 * lane + w) / 32][(4 * lane + w) % 32].to_le_bytes()).collect();
        bytes[lane % 17..].fill(0);
        let got: Vec<u8> = (0..4).flat_map(|w| found[w][lane].to_le_bytes()).collect();
        assert_eq!(got, bytes, "lane {lane}");
    }
    // Nothing is read of a source of no bytes: its address may be any.
    let body = "mov.u32 %r10, s; shl.b32 %r11, %lane, 4; add.u32 %r10, %r10, %r11; mov.u64 %d0, 3;
        cp.async.cg.shared.global [%r10], [%d0], 16, 0; cp.async.wait_all; ld.shared.u32 %r20, [%r10+4];";
    assert_eq!(try_warp(".shared .align 16 .b8 s[512];", body, &[], 1).unwrap()[0], [0; 32]);
}

#[test]
fn barriers_with_votes_and_numbers() {
    let body = "setp.lt.u32 %p1, %thread, 40; bar.red.popc.u32 %r20, 0, %p1; bar.red.and.pred %p2, 1, %p1; setp.lt.u32 %p4, %thread, 96; bar.red.or.pred %p3, 0, !%p4; selp.u32 %r21, 1, 0, %p2; selp.u32 %r22, 1, 0, %p3;";
    let found = run_text(&kernel("", body, 0, 3, 96), &[], 3, 96).unwrap();
    assert_eq!((found[0], found[95], found[96 + 3], found[2 * 96 + 50]), (40, 40, 0, 0));
    // Warps 0 and 1 meet at barrier 2; warp 2 only announces itself at barrier 3, where warp 0 waits for it.
    let body = "mov.u32 %r20, 1; mov.u32 %r10, s; setp.ge.u32 %p1, %thread, 64; @%p1 bra THIRD;
        shl.b32 %r11, %thread, 2; add.u32 %r12, %r10, %r11; st.shared.u32 [%r12], %thread; barrier.sync 2, 64;
        xor.b32 %r11, %r11, 128; add.u32 %r12, %r10, %r11; ld.shared.u32 %r20, [%r12];
        setp.ge.u32 %p2, %thread, 32; @%p2 bra END; bar.sync 3, 64; ld.shared.u32 %r20, [%r10+256]; bra END;
        THIRD: setp.eq.u32 %p3, %thread, 64; mov.u32 %r13, 1234; @%p3 st.shared.u32 [%r10+256], %r13; bar.arrive 3, 64; END:";
    let found = run_text(&kernel(".shared .align 4 .b8 s[260];", body, 0, 1, 96), &[], 1, 96).unwrap();
    assert_eq!((found[5], found[40], found[70]), (1234, 8, 1));
}
