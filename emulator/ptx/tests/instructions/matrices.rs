//! Fragments of `ldmatrix` and `mma.sync`, against layouts written down from the PTX manual's figures.

use half::{bf16, f16};

use crate::harness::{Lanes, try_warp, warp};

/// Asymmetric small integers: exact in every type, different in every place.
fn left(row: usize, k: usize) -> f32 {
    ((row * 7 + k * 3 + row * k) % 23) as f32 - 9.0
}

fn right(k: usize, column: usize) -> f32 {
    ((k * 5 + column * 11 + k * k) % 19) as f32 - 6.0
}

fn start(row: usize, column: usize) -> f32 {
    (row * 8 + column) as f32 / 4.0
}

fn product(depth: usize) -> impl Fn(usize, usize) -> f32 {
    move |row, column| start(row, column) + (0..depth).map(|k| left(row, k) * right(k, column)).sum::<f32>()
}

fn pack(low: u16, high: u16) -> u32 {
    u32::from(high) << 16 | u32::from(low)
}

/// The figures of m16n8k16 and m16n8k8 for 16-bit types: for each register of A the row and first column of lane `l`.
fn a_place(register: usize, lane: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane & 3);
    match register {
        0 => (group, thread * 2),
        1 => (group + 8, thread * 2),
        2 => (group, thread * 2 + 8),
        _ => (group + 8, thread * 2 + 8),
    }
}

fn c_place(element: usize, lane: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane & 3);
    match element {
        0 => (group, thread * 2),
        1 => (group, thread * 2 + 1),
        2 => (group + 8, thread * 2),
        _ => (group + 8, thread * 2 + 1),
    }
}

fn check(opcode: &str, a: &[Lanes], b: &[Lanes], depth: usize) {
    let mut inputs = a.to_vec();
    inputs.extend(b);
    let first_c = inputs.len();
    for element in 0..4 {
        inputs.push(std::array::from_fn(|lane| {
            let (row, column) = c_place(element, lane);
            start(row, column).to_bits()
        }));
    }
    let list =
        |from: usize, count: usize| (from..from + count).map(|i| format!("%r{i}")).collect::<Vec<_>>().join(", ");
    let moves: String = (0..4).map(|i| format!("mov.b32 %f{i}, %r{}; ", first_c + i)).collect();
    let body = format!(
        "{moves} {opcode} {{%f4, %f5, %f6, %f7}}, {{{}}}, {{{}}}, {{%f0, %f1, %f2, %f3}};
        mov.b32 %r20, %f4; mov.b32 %r21, %f5; mov.b32 %r22, %f6; mov.b32 %r23, %f7;",
        list(0, a.len()),
        list(a.len(), b.len())
    );
    let found = warp(&body, &inputs, 4);
    let due = product(depth);
    for (element, lanes) in found.iter().enumerate() {
        for (lane, &bits) in lanes.iter().enumerate() {
            let (row, column) = c_place(element, lane);
            assert_eq!(f32::from_bits(bits), due(row, column), "{opcode}: row {row}, column {column}");
        }
    }
}

#[test]
fn half_products() {
    type Bits = fn(f32) -> u16;
    let types: [(&str, Bits); 2] = [("f16", |x| f16::from_f32(x).to_bits()), ("bf16", |x| bf16::from_f32(x).to_bits())];
    for (name, bits) in types {
        for depth in [8, 16] {
            let a: Vec<Lanes> = (0..depth / 4)
                .map(|register| {
                    std::array::from_fn(|lane| {
                        let (row, k) = a_place(register, lane);
                        pack(bits(left(row, k)), bits(left(row, k + 1)))
                    })
                })
                .collect();
            let b: Vec<Lanes> = (0..depth / 8)
                .map(|register| {
                    std::array::from_fn(|lane| {
                        let (k, column) = ((lane & 3) * 2 + 8 * register, lane >> 2);
                        pack(bits(right(k, column)), bits(right(k + 1, column)))
                    })
                })
                .collect();
            let opcode = format!("mma.sync.aligned.m16n8k{depth}.row.col.f32.{name}.{name}.f32");
            check(&opcode, &a, &b, depth);
        }
    }
}

#[test]
fn tf32_products() {
    for depth in [4, 8] {
        let a: Vec<Lanes> = (0..depth / 2)
            .map(|register| {
                std::array::from_fn(|lane| {
                    let (group, thread) = (lane >> 2, lane & 3);
                    let (row, k) =
                        [(group, thread), (group + 8, thread), (group, thread + 4), (group + 8, thread + 4)][register];
                    // Bits below the 10 of tf32 are not read.
                    left(row, k).to_bits() | 0xFFF
                })
            })
            .collect();
        let b: Vec<Lanes> = (0..depth / 4)
            .map(|register| std::array::from_fn(|lane| right((lane & 3) + 4 * register, lane >> 2).to_bits()))
            .collect();
        check(&format!("mma.sync.aligned.m16n8k{depth}.row.col.f32.tf32.tf32.f32"), &a, &b, depth);
    }
}

#[test]
fn sums_are_cut_towards_zero() {
    // 1 + 2^-24 * 1.5 in one sum: nearest would go up to 1 + 2^-23, hardware cuts.
    let one = f16::from_f32(1.0).to_bits();
    let tiny = f16::from_bits(1).to_bits();
    let (a, b) = (pack(tiny, tiny), pack(one, f16::from_f32(0.5).to_bits()));
    let body = "mov.f32 %f0, 0f3F800000; mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f4, %f5, %f6, %f7}, {%r0, %r1}, {%r2}, {%f0, %f0, %f0, %f0}; mov.b32 %r20, %f4;";
    let only_first: Lanes = std::array::from_fn(|lane| if lane % 4 == 0 { a } else { 0 });
    let found = warp(body, &[only_first, [0; 32], [b; 32]], 1);
    assert_eq!(f32::from_bits(found[0][0]), 1.0);
}

/// 16-bit elements in shared memory, rows of 16 bytes at the given stride; the value tells matrix, row and column.
fn load(count: usize, transposed: bool) -> Vec<Lanes> {
    let stride = 48;
    // Lane l writes row l: eight elements 256 * l + column.
    let mut body = format!("mov.u32 %r10, s; mad.lo.u32 %r11, %lane, {stride}, %r10; shl.b32 %r12, %lane, 8;\n");
    for pair in 0..4 {
        body += &format!(
            "add.u32 %r13, %r12, {}; shl.b32 %r14, %r13, 16; add.u32 %r14, %r14, 65536; or.b32 %r14, %r14, %r13; st.shared.u32 [%r11+{}], %r14;\n",
            2 * pair,
            4 * pair
        );
    }
    let trans = if transposed { ".trans" } else { "" };
    let list = (0..count).map(|i| format!("%r{}", 20 + i)).collect::<Vec<_>>().join(", ");
    body += &format!("bar.warp.sync -1; ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{list}}}, [%r11];");
    try_warp(&format!(".shared .align 16 .b8 s[{}];", 32 * stride), &body, &[], count).unwrap()
}

#[test]
fn matrices_from_shared_memory() {
    for count in [1, 2, 4] {
        for (matrix, lanes) in load(count, false).iter().enumerate() {
            for (lane, &bits) in lanes.iter().enumerate() {
                // Row lane / 4 of matrix m was written by lane 8 m + row.
                let row = (256 * (8 * matrix + lane / 4)) as u16;
                let column = 2 * (lane % 4) as u16;
                assert_eq!(bits, pack(row + column, row + column + 1), "x{count}, matrix {matrix}, lane {lane}");
            }
        }
        for (matrix, lanes) in load(count, true).iter().enumerate() {
            for (lane, &bits) in lanes.iter().enumerate() {
                let column = (lane / 4) as u16;
                let row = |r: usize| (256 * (8 * matrix + r)) as u16;
                let first = 2 * (lane % 4);
                assert_eq!(bits, pack(row(first) + column, row(first + 1) + column), "x{count}.trans, matrix {matrix}");
            }
        }
    }
}
