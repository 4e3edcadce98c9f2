//! Divergence and re-convergence, and what lanes do together.

use std::array::from_fn;

use crate::harness::{Lanes, warp};

fn each(f: impl Fn(u32) -> u32) -> Lanes {
    from_fn(|lane| f(lane as u32))
}

#[test]
fn nested_ifs_meet_again() {
    // if (lane < 16) { if (lane & 1) x = 1 else x = 2 } else x = 3; then a shuffle of the whole warp.
    let body = "
        setp.ge.u32 %p1, %lane, 16; @%p1 bra ELSE;
        and.b32 %r10, %lane, 1; setp.eq.u32 %p2, %r10, 0; @%p2 bra EVEN;
        mov.u32 %r11, 1; bra.uni INNER;
        EVEN: mov.u32 %r11, 2;
        INNER: add.u32 %r11, %r11, 10; bra.uni END;
        ELSE: mov.u32 %r11, 3;
        END: shfl.sync.bfly.b32 %r20, %r11, 16, 31, -1; activemask.b32 %r21;";
    let found = warp(body, &[], 2);
    assert_eq!(
        found[0],
        each(|lane| if lane < 16 {
            3
        } else if lane % 2 == 1 {
            11
        } else {
            12
        })
    );
    assert_eq!(found[1], [u32::MAX; 32]);
}

#[test]
fn loops_of_different_lengths_meet_again() {
    let body = "
        mov.u32 %r10, 0; mov.u32 %r11, 0;
        LOOP: add.u32 %r11, %r11, %r10; add.u32 %r10, %r10, 1; setp.le.u32 %p1, %r10, %lane; @%p1 bra LOOP;
        redux.sync.add.u32 %r21, %r11, -1; mov.u32 %r20, %r11;";
    let found = warp(body, &[], 2);
    assert_eq!(found[0], each(|lane| lane * (lane + 1) / 2));
    assert_eq!(found[1], [(0..32).map(|lane| lane * (lane + 1) / 2).sum(); 32]);
}

#[test]
fn breaks_and_continues_meet_again() {
    // for (i = 0; i < 8; i++) { if (i == lane) break; if (i & 1) continue; x += i; } with votes of those inside.
    let body = "
        mov.u32 %r10, 0; mov.u32 %r20, 0; mov.u32 %r22, 0;
        LOOP: setp.eq.u32 %p1, %r10, %lane; @%p1 bra DONE;
        activemask.b32 %r12; popc.b32 %r12, %r12; add.u32 %r22, %r22, %r12;
        and.b32 %r11, %r10, 1; setp.ne.u32 %p2, %r11, 0; @%p2 bra NEXT;
        add.u32 %r20, %r20, %r10;
        NEXT: add.u32 %r10, %r10, 1; setp.lt.u32 %p3, %r10, 8; @%p3 bra LOOP;
        DONE: vote.sync.ballot.b32 %r21, %p1, -1;";
    let found = warp(body, &[], 3);
    let sum = |end: u32| (0..end).filter(|i| i % 2 == 0).sum::<u32>();
    assert_eq!(found[0], each(|lane| sum(lane.min(8))));
    assert_eq!(found[1], [0xFF; 32]);
    // Before round i, lanes 0..=i have left.
    assert_eq!(found[2], each(|lane| (0..lane.min(8)).map(|i| 31 - i).sum()));
}

#[test]
fn early_returns_leave_the_others_together() {
    // Lanes above 7 store and leave; the rest reduce among themselves.
    let body = "
        mov.u32 %r20, 99; setp.lt.u32 %p1, %lane, 8; @%p1 bra STAY;
        st.global.u32 [%out], %r20; ret;
        STAY: and.b32 %r10, %lane, 1; setp.eq.u32 %p2, %r10, 0; @%p2 bra MEET; add.u32 %r20, %r20, 1;
        MEET: redux.sync.max.u32 %r20, %r20, 255;";
    assert_eq!(warp(body, &[], 1)[0], each(|lane| if lane < 8 { 100 } else { 99 }));
}

#[test]
fn blocks_out_of_order_meet_at_the_next_sync() {
    // The slow side stands behind the end and jumps back: lanes that come first wait.
    let body = "
        mov.u32 %r11, 5; setp.lt.u32 %p1, %lane, 4; @%p1 bra SLOW;
        BACK: add.u32 %r11, %r11, %lane; shfl.sync.idx.b32 %r20, %r11, 3, 31, -1; bra.uni STORE;
        SLOW: mov.u32 %r11, 50; bra.uni BACK;
        STORE:";
    assert_eq!(warp(body, &[], 1)[0], [53; 32]);
}

#[test]
fn indexed_branches() {
    let body = "
        and.b32 %r10, %lane, 3;
        TABLE: .branchtargets A, B, C, B;
        brx.idx %r10, TABLE;
        A: mov.u32 %r20, 1; bra.uni E;
        B: mov.u32 %r20, 2; bra.uni E;
        C: mov.u32 %r20, 3;
        E: redux.sync.add.u32 %r21, %r20, -1;";
    let found = warp(body, &[], 2);
    assert_eq!(found[0], each(|lane| [1, 2, 3, 2][lane as usize % 4]));
    assert_eq!(found[1], [64; 32]);
}

#[test]
fn inline_blocks_have_their_own_registers_and_labels() {
    let body = "mov.u32 %r20, %lane; { .reg .b32 %r20; .reg .pred p; mov.u32 %r20, 7; setp.gt.u32 p, %lane, 9; @p bra L; mov.u32 %r21, %r20; L: }
        { .reg .b32 t; mov.u32 t, 5; setp.gt.u32 %p1, %lane, 9; @!%p1 bra L; mov.u32 %r21, t; L: }";
    let found = warp(body, &[], 2);
    assert_eq!(found[0], each(|lane| lane));
    assert_eq!(found[1], each(|lane| if lane > 9 { 5 } else { 7 }));
}

#[test]
fn shuffles() {
    let value = |lane: u32| 100 + lane;
    let body = |op: &str| format!("shfl.sync.{op}, -1; selp.u32 %r21, 1, 0, %p1;");
    let inputs = [each(value)];
    let up = warp(&body("up.b32 %r20|%p1, %r0, 3, 0"), &inputs, 2);
    assert_eq!(up[0], each(|lane| value(if lane < 3 { lane } else { lane - 3 })));
    assert_eq!(up[1], each(|lane| u32::from(lane >= 3)));
    let down = warp(&body("down.b32 %r20|%p1, %r0, 5, 31"), &inputs, 2);
    assert_eq!(down[0], each(|lane| value(if lane + 5 > 31 { lane } else { lane + 5 })));
    assert_eq!(down[1], each(|lane| u32::from(lane + 5 <= 31)));
    // Segments of eight lanes: mask 0x18 in the upper part of the clamp.
    let down = warp(&body("down.b32 %r20|%p1, %r0, 5, 0x181F"), &inputs, 2);
    assert_eq!(down[0], each(|lane| value(if lane % 8 + 5 > 7 { lane } else { lane + 5 })));
    let up = warp(&body("up.b32 %r20|%p1, %r0, 2, 0x1800"), &inputs, 2);
    assert_eq!(up[0], each(|lane| value(if lane % 8 < 2 { lane } else { lane - 2 })));
    let butterfly = warp(&body("bfly.b32 %r20|%p1, %r0, 6, 31"), &inputs, 2);
    assert_eq!(butterfly[0], each(|lane| value(lane ^ 6)));
    let index = warp(&body("idx.b32 %r20|%p1, %r0, 5, 0x181F"), &inputs, 2);
    assert_eq!(index[0], each(|lane| value(lane / 8 * 8 + 5)));
    // The lane operand is taken by 5 bits and may differ from lane to lane.
    let index = warp("sub.u32 %r10, 63, %lane; shfl.sync.idx.b32 %r20, %r0, %r10, 31, -1;", &inputs, 1);
    assert_eq!(index[0], each(|lane| value(31 - lane)));
}

#[test]
fn votes() {
    let body = "setp.gt.u32 %p1, %r0, 2; vote.sync.all.pred %p2, %p1, -1; vote.sync.any.pred %p3, %p1, -1; vote.sync.uni.pred %p4, %p1, -1;
        vote.sync.ballot.b32 %r20, %p1, -1; vote.sync.ballot.b32 %r24, !%p1, -1;
        selp.u32 %r21, 1, 0, %p2; selp.u32 %r22, 1, 0, %p3; selp.u32 %r23, 1, 0, %p4;";
    let found = warp(body, &[each(|lane| lane)], 5);
    let first: Vec<u32> = found.iter().map(|lanes| lanes[7]).collect();
    assert_eq!(first, [0xFFFF_FFF8, 0, 1, 0, 7]);
    let found = warp(body, &[[3; 32]], 5);
    assert_eq!(found.iter().map(|lanes| lanes[0]).collect::<Vec<_>>(), [u32::MAX, 1, 1, 1, 0]);
    // Uniform is also that nobody votes for it.
    let found = warp(body, &[[1; 32]], 5);
    assert_eq!(found.iter().map(|lanes| lanes[0]).collect::<Vec<_>>(), [0, 0, 0, 1, u32::MAX]);
}

#[test]
fn halves_of_a_warp_vote_apart() {
    // Both halves execute the same instruction together, each with its own mask.
    let body = "setp.lt.u32 %p1, %lane, 16; selp.b32 %r10, 0xFFFF, 0xFFFF0000, %p1; setp.eq.u32 %p2, %lane, 20;
        vote.sync.any.pred %p3, %p2, %r10; selp.u32 %r20, 1, 0, %p3; redux.sync.min.u32 %r21, %lane, %r10;";
    let found = warp(body, &[], 2);
    assert_eq!(found[0], each(|lane| u32::from(lane >= 16)));
    assert_eq!(found[1], each(|lane| lane / 16 * 16));
}

#[test]
fn matches_and_reductions() {
    let body = "match.any.sync.b32 %r20, %r0, -1; match.all.sync.b32 %r21|%p1, %r0, -1; selp.u32 %r22, 1, 0, %p1;
        redux.sync.min.s32 %r23, %r1, -1; redux.sync.max.u32 %r24, %r1, -1; redux.sync.xor.b32 %r25, %r1, -1; redux.sync.and.b32 %r26, %r1, -1; redux.sync.or.b32 %r27, %r1, -1;";
    let values = each(|lane| lane.wrapping_sub(2));
    let found = warp(body, &[each(|lane| lane % 3), values], 8);
    assert_eq!(found[0], each(|lane| (0..32).filter(|l| l % 3 == lane % 3).map(|l| 1 << l).sum()));
    assert_eq!((found[1][0], found[2][0]), (0, 0));
    assert_eq!(found[3][9], u32::MAX - 1);
    assert_eq!(found[4][9], u32::MAX);
    assert_eq!(found[5][9], values.iter().fold(0, |x, y| x ^ y));
    assert_eq!((found[6][9], found[7][9]), (0, u32::MAX));
    let found = warp(body, &[[5; 32], values], 8);
    assert_eq!((found[1][31], found[2][31]), (u32::MAX, 1));
}

#[test]
fn special_registers() {
    let body = "mov.u32 %r20, %lanemask_lt; mov.u32 %r21, %lanemask_ge; mov.u32 %r22, %lanemask_eq; mov.u32 %r23, %warpid; mov.u32 %r24, %ntid.x; mov.u32 %r25, %nctaid.y;
        mov.u32 %r10, %clock; mov.u32 %r11, %clock; setp.gt.u32 %p1, %r11, %r10; selp.u32 %r26, 1, 0, %p1; mov.u64 %d0, %clock64; mov.u32 %r27, %lanemask_gt; mov.u32 %r28, %lanemask_le;";
    let found = warp(body, &[], 9);
    assert_eq!(found[0], each(|lane| (1 << lane) - 1));
    assert_eq!(found[1], each(|lane| u32::MAX << lane));
    assert_eq!(found[2], each(|lane| 1 << lane));
    assert_eq!([found[3][5], found[4][5], found[5][5], found[6][5]], [0, 32, 1, 1]);
    assert_eq!(found[7], each(|lane| !((2u64 << lane) - 1) as u32));
    assert_eq!(found[8], each(|lane| ((2u64 << lane) - 1) as u32));
}
